"""Each paper's loss written plainly: the operations that its authors' code does, one after another, from the equations.

They are what our losses are held against. They check nothing, mask nothing and serve one case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_student = F.log_softmax(student / temperature, dim=1)
    probabilities = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, probabilities, reduction="batchmean") * temperature**2


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    label = torch.zeros_like(student).scatter_(1, target[:, None], 1)
    other = 1 - label

    def binary(logits: Tensor) -> Tensor:
        probabilities = F.softmax(logits / temperature, dim=1)
        return torch.stack([(probabilities * label).sum(1), (probabilities * other).sum(1)], dim=1)

    scale = temperature**2 / len(student)
    of_target = F.kl_div(binary(student).log(), binary(teacher), reduction="sum") * scale
    log_others = F.log_softmax(student / temperature - 1000 * label, dim=1)
    others = F.softmax(teacher / temperature - 1000 * label, dim=1)
    return alpha * of_target + beta * F.kl_div(log_others, others, reduction="sum") * scale


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    def pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
        return correlation

    ours, theirs = student.softmax(1), teacher.softmax(1)
    inter = 1 - pearson(ours, theirs).mean()
    intra = 1 - pearson(ours.T, theirs.T).mean()
    return beta * inter + gamma * intra


def nkd(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    rows, classes = student.shape
    ids = target[:, None]
    log_label = F.log_softmax(student, dim=1).gather(1, ids)
    label = F.softmax(teacher, dim=1).gather(1, ids)
    mask = torch.ones_like(student).scatter_(1, ids, 0).bool()
    log_others = F.log_softmax(student[mask].reshape(rows, classes - 1) / temperature, dim=1)
    others = F.softmax(teacher[mask].reshape(rows, classes - 1) / temperature, dim=1)
    return -(label * log_label).mean() - gamma * temperature**2 * (others * log_others).sum(1).mean()


def uskd(
    student: Tensor,
    weak: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    smoothing: float = 0.1,
) -> Tensor:
    rows, classes = student.shape
    ids = target[:, None]
    log_student = F.log_softmax(student, dim=1)
    probability = log_student.exp().gather(1, ids).detach()
    soft = probability**2 + 1 - (probability**2).mean(0, keepdim=True)
    of_target = -(soft * log_student.gather(1, ids)).mean()
    log_weak = F.log_softmax(weak, dim=1)
    smooth = torch.full_like(weak, smoothing / classes).scatter_(1, ids, 1 - smoothing + smoothing / classes)
    of_weak = -(smooth * log_weak).sum(1).mean()
    mask = torch.ones_like(student).scatter_(1, ids, 0).bool()
    first, second = log_weak.exp().detach(), log_student.detach()
    score = first / (1 - first.gather(1, ids) + 1e-6) + second / (1 - second.gather(1, ids) + 1e-6)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    zipf = (1 / (rank + 1).to(student))[mask].reshape(rows, classes - 1)
    zipf = zipf / zipf.sum(1, keepdim=True)
    log_others = F.log_softmax(student[mask].reshape(rows, classes - 1), dim=1)
    return alpha * of_target - beta * (zipf * log_others).sum(1).mean() + mu * of_weak


def ofa(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    label = F.one_hot(target, student.shape[1]).to(student)
    probabilities = F.softmax(teacher / temperature, dim=1)
    weight = torch.pow(probabilities + label, gamma) - label
    return -(weight * F.log_softmax(student / temperature, dim=1)).sum(1).mean()


def ofakd(student: Tensor, exits: Sequence[Tensor], teacher: Tensor, target: Tensor, gamma: float) -> Tensor:
    whole = F.cross_entropy(student, target) + ofa(student, teacher, target, gamma)
    for logits in exits:
        whole = whole + ofa(logits, teacher, target, gamma)
    return whole


def mcmi(student: Tensor, target: Tensor, centroids: Tensor, weight: float = 0.15) -> Tensor:
    probabilities = F.softmax(student, dim=1)
    cmi = F.kl_div(centroids[target].log(), probabilities, reduction="batchmean")
    return F.cross_entropy(student, target) - weight * cmi


def tgeo_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    mean: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    temperature: float = 4.0,
) -> Tensor:
    """The authors' state and network; cross-entropy of logits, as their paper has it."""
    with torch.no_grad():
        ours, theirs = student.softmax(1), teacher.softmax(1)
        truth = F.one_hot(target, student.shape[1]).to(student)
        edges = [(mean - ours) ** 2, (truth - ours) ** 2, (theirs - ours) ** 2]
        edges += [(theirs - truth) ** 2, (mean - truth) ** 2]
        hidden = torch.cat([ours, theirs, truth, mean, *edges], dim=1)
        for weight, bias in layers[:-1]:
            hidden = F.leaky_relu(F.linear(hidden, weight, bias))
        ratio = torch.sigmoid(F.linear(hidden, *layers[-1]))[:, 0]
    log_student = F.log_softmax(student / temperature, dim=1)
    kd = F.kl_div(log_student, F.softmax(teacher / temperature, dim=1), reduction="none").sum(1)
    label = F.cross_entropy(student, target, reduction="none")
    return (ratio * temperature**2 * kd + (1 - ratio) * label).mean()


def wa(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    log_student = torch.log_softmax(student[:, : teacher.shape[1]] / temperature, dim=1)
    return -(torch.softmax(teacher / temperature, dim=1) * log_student).sum(1).mean()


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def at(student: Tensor, teacher: Tensor) -> Tensor:
    def attention(maps: Tensor) -> Tensor:
        return F.normalize(maps.pow(2).mean(1).reshape(len(maps), -1))

    return (attention(student) - attention(teacher)).pow(2).mean()


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    def distances(rows: Tensor) -> Tensor:
        squares = rows.pow(2).sum(1)
        found: Tensor = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=1e-12).sqrt()
        found = found * (1 - torch.eye(len(rows)).to(rows))
        scaled: Tensor = found / found[found > 0].mean()
        return scaled

    def angles(rows: Tensor) -> Tensor:
        directions = F.normalize(rows[None] - rows[:, None], dim=2)
        return torch.bmm(directions, directions.transpose(1, 2)).view(-1)

    distance = F.smooth_l1_loss(distances(student), distances(teacher))
    return 25 * distance + 50 * F.smooth_l1_loss(angles(student), angles(teacher))


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    def affinities(rows: Tensor) -> Tensor:
        unit = rows / (rows.pow(2).sum(1, keepdim=True).sqrt() + eps)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    ours, theirs = affinities(student), affinities(teacher)
    return (theirs * ((theirs + eps) / (ours + eps)).log()).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    def gram(maps: Tensor) -> Tensor:
        rows = maps.reshape(len(maps), -1)
        return F.normalize(rows @ rows.T)

    difference = gram(teacher) - gram(student)
    return (difference * difference).sum() / len(student) ** 2


def vid(mean: Tensor, teacher: Tensor, log_scale: Tensor, eps: float = 1e-5) -> Tensor:
    variance = ((1 + log_scale.exp()).log() + eps).view(1, -1, 1, 1)
    return (0.5 * ((mean - teacher) ** 2 / variance + variance.log())).mean()


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < student.shape[2]:
            weight /= 2
            ours = F.adaptive_avg_pool2d(student, (level, level))
            theirs = F.adaptive_avg_pool2d(teacher, (level, level))
            loss = loss + weight * F.mse_loss(ours, theirs)
            total += weight
    return loss / total


def bdkd(student: Tensor, teacher: Tensor, delta: float = 2.0) -> Tensor:
    """No code of the authors' is public: the card's equations, one after the other."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    ours, theirs = log_student.exp(), log_teacher.exp()
    forward = (theirs * (log_teacher - log_student)).sum(1)
    reverse = (ours * (log_student - log_teacher)).sum(1)
    gap = ((ours * log_student).sum(1) - (theirs * log_teacher).sum(1)).detach()
    to_forward = torch.where(gap > 0, delta, torch.ones_like(gap))
    to_reverse = torch.where(gap > 0, torch.ones_like(gap), delta)
    return (to_forward * forward + to_reverse * reverse).mean()


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0, eps: float = 1e-8) -> Tensor:
    ours = (student / temperature).sigmoid().clamp(eps, 1 - eps)
    theirs = (teacher / temperature).sigmoid().clamp(eps, 1 - eps)
    return _binary(theirs, ours) * temperature**2


def binary_kl_norm(student: Tensor, teacher: Tensor, temperature: float = 2.0, eps: float = 1e-8) -> Tensor:
    ours = ((student - teacher) / temperature).sigmoid().clamp(eps, 1 - eps)
    return _binary(torch.full_like(ours, 0.5), ours) * temperature**2


def _binary(target: Tensor, found: Tensor) -> Tensor:
    divergence = target * (target / found).log() + (1 - target) * ((1 - target) / (1 - found)).log()
    return divergence.sum(1).mean()


def nd(student: Tensor, teacher: Tensor, means: Tensor, target: Tensor) -> Tensor:
    """The authors' loop over rows, as one operation for all of them."""
    means = means[target]
    direction = means / means.norm(dim=1, keepdim=True)
    longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    loss: Tensor = (1 - (student * direction).sum(1) / longest).mean()
    return loss


def crd(
    student: Tensor,
    teacher: Tensor,
    memories: tuple[Tensor, Tensor],
    index: Tensor,
    contrast: Tensor,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> Tensor:
    """The first step of a run; the memories, of student and teacher, are changed in place."""
    rows, width = memories[0].shape
    noise = (contrast.shape[1] - 1) / rows

    def side(embedding: Tensor, memory: Tensor) -> Tensor:
        chosen = memory.index_select(0, contrast.view(-1)).view(*contrast.shape, width)
        scores = torch.bmm(chosen, embedding.view(-1, width, 1)).squeeze(2).div(temperature).exp()
        scores = scores / (scores.mean() * rows).detach()
        positive = (scores[:, 0] / (scores[:, 0] + noise + eps)).log()
        negative = (noise / (scores[:, 1:] + noise + eps)).log()
        return -(positive.sum() + negative.sum()) / len(embedding)

    loss = side(student, memories[1]) + side(teacher, memories[0])
    with torch.no_grad():
        for memory, embedding in zip(memories, (student, teacher), strict=True):
            moved = memory.index_select(0, index) * 0.5 + embedding * 0.5
            memory.index_copy_(0, index, moved / moved.pow(2).sum(1, keepdim=True).sqrt())
    return loss


def mixstd(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 0.1, alpha: float = 0.9
) -> Tensor:
    ours = F.log_softmax(student / student.std(dim=1, keepdim=True), dim=1)
    theirs = F.softmax(teacher / teacher.std(dim=1, keepdim=True), dim=1)
    label = -(target * ours).sum(1).mean()
    return gamma * label + alpha * F.kl_div(ours, theirs, reduction="batchmean")


def trg(student: Tensor, teacher: Tensor, images: Tensor, others: Tensor, k: int = 8) -> Tensor:
    def graph(tokens: Tensor) -> Tensor:
        tokens = F.normalize(tokens, dim=1)
        distances = torch.cdist(tokens, tokens).square()
        far = distances.detach() + 1e9 * torch.eye(len(tokens), dtype=tokens.dtype, device=tokens.device)
        near = torch.zeros_like(far).scatter_(0, far.topk(k, dim=0, largest=False).indices, 1)
        return torch.exp(-distances / 2) * near

    def context(tokens: Tensor) -> Tensor:
        return torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)) / tokens.shape[2] ** 0.5, dim=2)

    local = F.kl_div(
        F.log_softmax(graph(student), dim=1), F.softmax(graph(teacher), dim=1), reduction="batchmean"
    )
    cosines = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
    contrast = -torch.log_softmax(cosines / 0.1, dim=1).diagonal().mean()
    return local + contrast + (context(others) - context(images)).square().mean()


def dmae_reconstruction(prediction: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6) ** 0.5
    errors = ((prediction - target) ** 2).mean(dim=-1)
    return (errors * mask).sum() / mask.sum()


def dmae_align(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    ours = F.normalize(F.linear(student, weight, bias), dim=-1)
    return (ours - F.normalize(teacher, dim=-1)).abs().mean()
