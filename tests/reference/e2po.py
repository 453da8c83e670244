"""E2PO's perturbed conditions (section 4.2, Eqs. 9 to 13), one prompt and one variant at a time."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.reference import plain, world
from tests.reference.plain import Condition
from tests.reference.world import Scene


@dataclass(frozen=True)
class Perturbing:
    """The paper's settings; learning rate and sigma_init are the product's, the paper's text lost them."""

    variants: int
    perturbation_range: float = 0.4
    static: bool = False
    anchored: bool = True
    encoders: tuple[str, ...] = ("clip_l",)
    target: float = 0.80
    margin: float = 0.01
    weight: float = 50.0
    weighted: str = "diversity"
    steps: int = 0
    lr: float = 1e-3
    sigma_init: float = 1e-3
    max_norm: float = 0.05
    relative: bool = False
    seed: int = 0

    @property
    def learned(self) -> int:
        return self.variants - 1 if self.anchored else self.variants

    def condition(self, scene: Scene, variant: int, t: float) -> Condition:
        """c_k(t) = lambda c_k + (1 - lambda) c_0; with the anchor in the set, variant 0 is c_0."""
        tokens, pooled, references = plain.anchor(scene)
        number = variant - 1 if self.anchored else variant
        if number < 0:
            return tokens, pooled, references
        tau = self.perturbation_range
        share = 1.0 if self.static else min(1.0, max(0.0, (t - (1 - tau)) / tau))
        deltas = perturbations(self, scene.prompt)
        changed = {name: at_words(name, scene.prompt, delta[number]) for name, delta in deltas.items()}
        own_tokens, own_pooled = world.text(scene.prompt, changed)
        return (
            share * own_tokens + (1 - share) * tokens,
            share * own_pooled + (1 - share) * pooled,
            references,
        )

    def drawn(self, name: str, prompt: str) -> Tensor:
        """N(0, sigma_init^2), from the prompt's own generator [9]."""
        shape = (self.learned, len(prompt.split()), world.COLUMNS[name])
        noise = torch.randn(shape, generator=plain.drawer(self.seed, name, prompt), dtype=torch.float64)
        return self.bounded(name, prompt, self.sigma_init * noise)

    def bounded(self, name: str, prompt: str, delta_KND: Tensor) -> Tensor:
        """Each word's perturbation no longer than the bound: a length, or a share of the word's own."""
        words = world.static_embeddings(name, prompt)[1 : 1 + delta_KND.shape[1]]
        found = delta_KND.clone()
        for k in range(delta_KND.shape[0]):
            for n in range(delta_KND.shape[1]):
                limit = self.max_norm * (words[n].norm() if self.relative else 1.0)
                if delta_KND[k, n].norm() > limit:
                    found[k, n] = delta_KND[k, n] * limit / delta_KND[k, n].norm()
        return found

    def objective(self, prompt: str, deltas: dict[str, Tensor]) -> Tensor:
        """The band around the anchor [12], and the mean similarity of all pairs of variants [11]."""
        h0, h = self.features(prompt, deltas)
        band = sum(
            (abs(cosine_similarity(one, h0, dim=0) - self.target) - self.margin).clamp_min(0) for one in h
        ) / len(h)
        pairs = [cosine_similarity(h[i], h[j], dim=0) for i in range(len(h)) for j in range(i)]
        spread = sum(pairs) / max(1, len(pairs))
        return self.weight * band + spread if self.weighted == "anchor" else band + self.weight * spread

    def features(self, prompt: str, deltas: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """h_0 and every h_k: the pooled features of the perturbed encoders, side by side."""
        ids = world.token_ids(prompt)[None]

        def pooled(k: int | None) -> Tensor:
            parts = []
            for name in self.encoders:
                embedded = world.static_embeddings(name, prompt)
                if k is not None:
                    embedded = at_words(name, prompt, deltas[name][k])
                parts.append(world.CLIPS[name].run(ids, embedded[None])[1][0])
            return torch.cat(parts)

        return pooled(None), [pooled(k) for k in range(self.learned)]

    def figures(self, prompts: list[str]) -> dict[str, float]:
        """What the log says of some prompts' variants."""
        anchors, pairs, shares = [], [], []
        for prompt in prompts:
            deltas = perturbations(self, prompt)
            h0, h = self.features(prompt, deltas)
            anchors += [cosine_similarity(one, h0, dim=0).item() for one in h]
            own = [cosine_similarity(h[i], h[j], dim=0).item() for i in range(len(h)) for j in range(i)]
            pairs += [plain.mean(own)] if own else []
            lengths = []
            for name, delta in deltas.items():
                words = world.static_embeddings(name, prompt)[1 : 1 + delta.shape[1]]
                lengths += (delta.norm(dim=2) / words.norm(dim=1)).flatten().tolist()
            shares.append(plain.mean(lengths))
        outside = [abs(x - self.target) > self.margin + 1e-3 for x in anchors]
        return {
            "anchor_cosine": plain.mean(anchors),
            "anchor_cosine_min": min(anchors),
            "in_band_share": 1 - plain.mean([float(x) for x in outside]),
            "delta_norm_share": plain.mean(shares),
        } | ({"pairwise_cosine": plain.mean(pairs)} if pairs else {})


@cache
def perturbations(settings: Perturbing, prompt: str) -> dict[str, Tensor]:
    """Encoder -> what is added to each word's embedding, [K, N, D]: drawn, bounded, then learned."""
    deltas = {name: settings.drawn(name, prompt) for name in settings.encoders}
    optimizer = {name: (torch.zeros_like(delta), torch.zeros_like(delta)) for name, delta in deltas.items()}
    for step in range(1, settings.steps + 1):
        leaves = {name: delta.clone().requires_grad_() for name, delta in deltas.items()}
        gradients = torch.autograd.grad(settings.objective(prompt, leaves), list(leaves.values()))
        for name, g in zip(leaves, gradients, strict=True):
            # torch's AdamW with its own defaults
            first, second = optimizer[name]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            optimizer[name] = first, second
            moved = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            left = settings.steps - step + 1  # the last fifth of the steps is ever smaller
            lr = settings.lr * min(1, 5 * left / settings.steps)
            deltas[name] = deltas[name] * (1 - lr * 0.01) - lr * moved
            deltas[name] = settings.bounded(name, prompt, deltas[name])
    return deltas


def at_words(name: str, prompt: str, delta_ND: Tensor) -> Tensor:
    """Input embeddings [L, D] with something added to the words alone: neither start, nor end, nor padding [10]."""
    embedded = world.static_embeddings(name, prompt).clone()
    embedded[1 : 1 + len(delta_ND)] = embedded[1 : 1 + len(delta_ND)] + delta_ND
    return embedded
