"""A contract type for import-linter: some modules may import these packages and nothing else.

The contracts that import-linter ships name what is forbidden, so a package that nobody thought of passes. This one
names what is allowed. `.importlinter` uses it as ``type = only``; the standard library and a source's own package are
always allowed.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from grimp import DetailedImport, ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.domain.helpers import module_expressions_to_modules


class OnlyContract(Contract):
    """Options: ``source_modules`` (with wildcards), ``allowed_modules`` (each with all that is inside it) and
    ``as_packages`` (true: a source counts with all that is inside it)."""

    type_name = "only"

    source_modules = fields.SetField(subfield=fields.ModuleExpressionField())
    allowed_modules = fields.SetField(subfield=fields.StringField(), required=False)
    as_packages = fields.BooleanField(required=False, default=True)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        allowed = self._allowed() | sys.stdlib_module_names
        sources = module_expressions_to_modules(
            graph, cast(Any, self.source_modules), raise_if_unmatched=True
        )
        found: list[DetailedImport] = []
        for source in sorted(source.name for source in sources):
            own = {source} if self.as_packages else set()
            inside = graph.find_descendants(source) if self.as_packages else set()
            for importer in sorted({source, *inside}):
                for imported in sorted(graph.find_modules_directly_imported_by(importer)):
                    if not _lies_in(imported, allowed | own):
                        found += graph.get_import_details(importer=importer, imported=imported)
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for entry in check.metadata["found"]:
            where = f"{entry['importer']} -> {entry['imported']} (l.{entry['line_number']})"
            output.print_error(f"- {where}: {entry['line_contents']}", bold=False)
        output.print_error(
            f"Allowed beside the standard library: {', '.join(sorted(self._allowed())) or 'nothing'}."
        )
        output.new_line()

    def _allowed(self) -> set[str]:
        # A field holds its parsed value, or None, on an instance; import-linter's own annotations do not say so.
        return set(cast(Any, self.allowed_modules) or ())


def _lies_in(module: str, packages: set[str]) -> bool:
    """Whether a dotted name is one of the packages or lies inside one."""
    parts = module.split(".")
    return any(".".join(parts[:end]) in packages for end in range(1, len(parts) + 1))
