"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // Figures carry colours as "var(--name)" or "var(--name) 0.3"; the theme's values take their place when they are drawn.
  function color(text) {
    const match = /^var\((--[\w-]+)\)(?: ([\d.]+))?$/.exec(text);
    if (!match) return text;
    const value = getComputedStyle(root).getPropertyValue(match[1]).trim();
    if (match[2] === undefined) return value;
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${match[2]})`;
  }

  function painted(value, key = "") {
    if (Array.isArray(value)) return value.map((item) => painted(item, key));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
    }
    return typeof value === "string" && /color(scale)?$/i.test(key) ? color(value) : value;
  }

  function layoutOf(own, width) {
    const axis = {
      gridcolor: "var(--line)", zeroline: false, linecolor: "var(--line)", automargin: true, nticks: 6,
      tickfont: { color: "var(--muted)" }, title: { font: { color: "var(--muted)", size: 12 }, standoff: 10 },
    };
    const titled = (given) => ({ ...axis, ...given, title: given.title && { ...axis.title, ...given.title } });
    const apart = (given) => (given.type === "category" ? 17 : 75); // pixels from one label to the next
    const axes = Object.keys(own).filter((name) => /^[xy]axis\d*$/.test(name)).map((name) => [name, titled({
      ...(name[0] === "x" && { nticks: Math.max(4, Math.round(width / apart(own[name]))) }),
      ...(name[0] === "y" && own[name].type === "category" && { nticks: Math.round(own.height / apart(own[name])) }),
      ...own[name],
    })]);
    return painted({
      ...own,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "var(--muted)" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      margin: { l: 8, r: 14, t: 8, b: 8, ...own.margin },
      hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--muted)", font: { color: "var(--ink)", size: 13 }, align: "left" },
      ...Object.fromEntries(axes),
    });
  }

  class Chart {
    constructor(element) {
      this.element = element;
      this.plot = element.querySelector(".plot");
      this.figure = JSON.parse(element.querySelector("script").textContent);
      this.hidden = new Set();
      this.drawn = false;
      const save = element.querySelector(".save");
      save.hidden = false;
      save.addEventListener("click", () => {
        const name = element.querySelector("h2, h3, h4, h5").textContent.trim().toLowerCase().replace(/[^a-z0-9]+/g, "-");
        Plotly.downloadImage(this.plot, { format: "svg", width: 760, height: this.figure.layout.height, filename: name });
      });
    }

    draw() {
      if (this.element.closest("details:not([open])")) return; // drawn when that opens
      if (!this.drawn) this.plot.replaceChildren();
      this.drawn = true;
      const data = this.figure.data.map((trace) => ({ ...painted(trace), visible: !this.hidden.has(trace.meta) }));
      Plotly.react(this.plot, data, layoutOf(this.figure.layout, this.plot.clientWidth), { displayModeBar: false, responsive: true, displaylogo: false });
    }

    show(key, shown) {
      if (shown) this.hidden.delete(key);
      else this.hidden.add(key);
      if (this.drawn) this.draw();
    }
  }

  const charts = new Map(all("figure.chart").map((element) => [element, new Chart(element)]));
  const redraw = () => charts.forEach((chart) => chart.draw());

  all(".legend button").forEach((button) => {
    const scope = button.closest("figure.chart") ?? button.closest(".figures");
    const within = scope.matches("figure.chart") ? [scope] : all("figure.chart", scope);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      within.forEach((element) => charts.get(element).show(button.dataset.key, shown));
    });
  });
  all("details").forEach((details) => {
    details.addEventListener("toggle", () => {
      if (details.open) all("figure.chart", details).forEach((element) => charts.get(element).draw());
    });
  });

  // Theme: the system's, until the reader chooses.
  const toggle = document.querySelector(".theme");
  const remembered = () => { try { return localStorage.getItem("tutelage-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("tutelage-theme", theme); } catch { /* a page without storage forgets */ } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  function themed() {
    toggle.textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `${toggle.textContent} theme`);
    redraw();
  }
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    themed();
  });
  dark.addEventListener("change", themed);

  // Tables: a click on a column's name sorts by it, another turns the order. Cells without a value stay last.
  function compare(a, b) {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  }
  function sort(table, column, direction) {
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows];
    const known = rows.filter((row) => key(row) !== undefined).sort((a, b) => direction * compare(key(a), key(b)));
    table.tBodies[0].append(...known, ...rows.filter((row) => key(row) === undefined));
  }
  all("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const turned = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")] ?? first;
        heads.forEach((other) => other.setAttribute("aria-sort", other === head ? turned : "none"));
        sort(table, column, turned === "ascending" ? 1 : -1);
      });
    });
  });

  all(".hint").slice(1).forEach((hint) => hint.remove()); // once a page is enough

  all(".copy").forEach((button) => {
    const code = button.closest(".code").querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2500);
    });
  });

  function openTarget() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const folded = target && target.closest("details");
    if (folded) folded.open = true;
  }
  addEventListener("hashchange", openTarget);
  openTarget();
  themed();
})();
