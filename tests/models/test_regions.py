"""Attention by region: a prompt with the whole picture draws its own, one without a place in it says nothing."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from tests import tiny, tiny_language
from tests.tolerance import MODEL, PICTURE, STORES, agree, agree_in_norm
from torch import Tensor, nn

from pixrl import models
from pixrl.algorithms import make_mixing
from pixrl.algorithms.fusion.mixing import Pooled, RegionsSettings, Shape
from pixrl.conformance import check_renderer
from pixrl.device import Precision
from pixrl.doctor.fusion import examine_fusion
from pixrl.errors import InputError, RunError, ShapeError
from pixrl.fusion.config import FuseConfig
from pixrl.models.base import Conditioning
from pixrl.models.conditioning import check_pairs
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.regions import text_bias
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy

OWL, SNAIL, CAT = "a photo of an owl", "a photo of a snail", "a photo of a cat"
SEEDS = [1, 2, 3]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd3": lambda folder: tiny.sd3(folder, card=tiny.SD3_CARD, dual=True),
    "sdxl": tiny.sdxl,
    "flux": lambda folder: tiny.flux(folder, guidance_embeds=True),
}
GUIDED = ("sd3", "sdxl")
GRID = 4
"""Rows and columns of image tokens where the tiny models attend, of pictures of 32 x 32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("regions")
    return {name: make(root / name) for name, make in FAMILIES.items()}


def load(folder: Path, resolution: int | str = 32) -> FlowPipelinePolicy:
    policy = models.load(folder, device="cpu", dtype="float32", resolution=resolution)
    assert isinstance(policy, FlowPipelinePolicy)
    return policy


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest, folders: dict[str, Path]) -> FlowPipelinePolicy:
    return load(folders[request.param])


def divided(
    policy: FlowPipelinePolicy, shares: Sequence[Sequence[float]], prompts: Sequence[str], **settings: Any
) -> Conditioning:
    """What the mixing `regions` makes of these shares, a row each."""
    mixing = make_mixing(
        RegionsSettings(**settings), policy.encode(prompts), policy.settings.steps, Pooled.WEIGHT
    )
    mixed = mixing.mix(torch.tensor(shares)[:, :, None])
    assert isinstance(mixed, Conditioning)
    return mixed


def by_masks(policy: FlowPipelinePolicy, masks_NHW: Tensor, prompts: Sequence[str]) -> Conditioning:
    """One row of these masks; the pooled features are the first prompt's."""
    found = policy.encode(prompts)
    assert found.pooled_BE is not None
    return Conditioning(
        found.tokens_BLD.flatten(0, 1)[None], found.pooled_BE[:1], regions_BNHW=masks_NHW[None]
    )


def halves(columns: int = GRID, *, across: bool = False) -> Tensor:
    """The upper half for the first prompt and the lower one for the second; `across`: the left half and the right."""
    mask_HW = torch.zeros(GRID, columns)
    if across:
        mask_HW[:, : columns // 2] = 1
    else:
        mask_HW[: GRID // 2] = 1
    return torch.stack((mask_HW, 1 - mask_HW))


@torch.no_grad()
def velocity(policy: FlowPipelinePolicy, rows: Conditioning) -> Tensor:
    t_B = torch.tensor([0.9, 0.5, 0.2])[: len(rows)]
    return policy.velocity(policy.initial_noise(SEEDS[: len(rows)]), t_B, rows)


EACH = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_the_whole_picture_is_that_prompts_own(policy: FlowPipelinePolicy, guidance: float) -> None:
    policy.settings = replace(policy.settings, steps=2, guidance=guidance)
    prompts = [OWL, SNAIL, CAT]
    alone, mixed = policy.encode(prompts), divided(policy, EACH, prompts)
    assert agree(velocity(policy, mixed), velocity(policy, alone), MODEL)
    assert agree(policy.sample(mixed, SEEDS), policy.sample(alone, SEEDS), PICTURE)
    assert not torch.allclose(velocity(policy, alone)[0], velocity(policy, alone[[1]])[0], atol=0.1)


@pytest.mark.parametrize("resolution", ["48x32", "36x36"])
def test_so_it_is_in_pictures_of_other_shapes(folders: dict[str, Path], resolution: str) -> None:
    """36 pixels are 9 rows of latents, 5 where SDXL attends; transformers take them two by two."""
    for name in GUIDED if resolution == "48x32" else ("sdxl",):
        policy = load(folders[name], resolution)
        mixed = divided(policy, EACH, [OWL, SNAIL, CAT])
        assert agree(velocity(policy, mixed), velocity(policy, policy.encode([OWL, SNAIL, CAT])), MODEL)


def test_so_it_is_in_half_precision(policy: FlowPipelinePolicy) -> None:
    policy.precision = Precision(torch.float32, torch.bfloat16)
    mixed = divided(policy, EACH, [OWL, SNAIL, CAT])
    alone = velocity(policy, policy.encode([OWL, SNAIL, CAT]))
    assert agree_in_norm(velocity(policy, mixed), alone, STORES, dtype=torch.bfloat16)


def test_a_prompt_without_a_place_says_nothing(policy: FlowPipelinePolicy) -> None:
    """Bit for bit: what it says is not read, and neither are its pooled features."""
    shares = [[0.3, 0.7, 0.0]]
    mixed, other = (divided(policy, shares, [OWL, SNAIL, third]) for third in (CAT, "a red car"))
    assert not torch.equal(mixed.tokens_BLD, other.tokens_BLD)
    assert torch.equal(velocity(policy, mixed), velocity(policy, other))
    assert not torch.equal(
        velocity(policy, mixed), velocity(policy, divided(policy, [[0.3, 0, 0.7]], [OWL, SNAIL, CAT]))
    )


def test_one_prompt_in_any_regions_of_a_unet_is_that_prompt(folders: dict[str, Path]) -> None:
    """Where the text does not attend to the image, masks that sum to one divide nothing between equal texts."""
    policy = load(folders["sdxl"])
    shares = [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]]
    same = divided(policy, shares, [OWL] * 3, shape=Shape.INSIDE_OUT, soft=1.0)
    assert agree(velocity(policy, same), velocity(policy, policy.encode([OWL] * 3)), MODEL)


def first_attention(policy: FlowPipelinePolicy) -> list[nn.Module]:
    """The first layer in which a picture attends to text, and FLUX's first of the other kind."""
    named = dict(policy.denoiser.named_modules())
    if isinstance(policy, SDXLPolicy):
        return [next(module for name, module in named.items() if name.endswith("attn2"))]
    blocks = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    return [named[name] for name in blocks if name in named]


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Collects the arguments, by name, and the results of a layer."""
    seen: list[tuple[dict[str, Any], Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(({**dict(zip(["hidden_states"], args, strict=False)), **kwargs}, output))

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    yield seen
    hook.remove()


def seen_by(policy: FlowPipelinePolicy, rows: Conditioning, layer: nn.Module) -> tuple[dict[str, Any], Any]:
    with watched(layer) as seen:
        velocity(policy, rows)
    return seen[0]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_first_layer_a_half_knows_its_own_prompt_alone(
    name: str, across: bool, folders: dict[str, Path]
) -> None:
    """Of pictures that are wider than high, so that rows are no columns."""
    policy = load(folders[name], "48x32")
    policy.settings = replace(policy.settings, guidance=0.0)
    layer = first_attention(policy)[0]
    columns = GRID * 3 // 2
    masks_NHW = halves(columns, across=across)
    pictures = []
    for second in (SNAIL, CAT):
        found = seen_by(policy, by_masks(policy, masks_NHW, [OWL, second]), layer)[1]
        pictures.append((found[0] if isinstance(found, tuple) else found)[0].unflatten(0, (GRID, columns)))
    one, other = (x.transpose(0, 1) if across else x for x in pictures)
    border = len(one) // 2
    assert torch.equal(one[:border], other[:border])
    assert bool(((one[border:] - other[border:]).abs().amax(dim=2) > 1e-3).all())


def heads(x_BKC: Tensor, width: int) -> Tensor:
    return x_BKC.unflatten(2, (-1, width)).transpose(1, 2)


def projected(layer: Any, given: dict[str, Any], is_text_first: bool) -> list[Tensor]:
    """Queries, keys and values [B, H, K, D] of a layer: for SDXL queries of the image and keys of the text."""
    image, text = given["hidden_states"], given.get("encoder_hidden_states")
    width = layer.to_q.out_features // layer.heads
    if getattr(layer, "add_k_proj", None) is None:  # cross attention, or FLUX's tokens in one sequence
        keys = image if text is None else text
        found = [heads(layer.to_q(image), width), *(heads(f(keys), width) for f in (layer.to_k, layer.to_v))]
        norms = [layer.norm_q, layer.norm_k]
        found[:2] = [x if norm is None else norm(x) for norm, x in zip(norms, found[:2], strict=True)]
    else:
        own, added = (
            (layer.to_q, layer.to_k, layer.to_v),
            (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj),
        )
        pair = [[heads(f(image), width) for f in own], [heads(f(text), width) for f in added]]
        for parts, norms in zip(
            pair, [(layer.norm_q, layer.norm_k), (layer.norm_added_q, layer.norm_added_k)], strict=True
        ):
            parts[:2] = [norm(x) for norm, x in zip(norms, parts[:2], strict=True)]
        order = pair[::-1] if is_text_first else pair
        found = [torch.cat(parts, dim=2) for parts in zip(*order, strict=True)]
    if given.get("image_rotary_emb") is not None:
        found[:2] = [apply_rotary_emb(x, given["image_rotary_emb"], sequence_dim=2) for x in found[:2]]
    return found


def weighed(masks_NHW: Tensor, length: int, is_text_first: bool) -> Tensor:
    """How much each query may make of each key, [K, K] of text and image, written out token by token."""
    concepts, places = len(masks_NHW), masks_NHW[0].numel()
    kinds: list[tuple[str, int]] = [("text", token // length) for token in range(concepts * length)]
    pixels = [("image", place) for place in range(places)]
    tokens = [*kinds, *pixels] if is_text_first else [*pixels, *kinds]
    weights = torch.ones(len(tokens), len(tokens))
    for query, (what, at) in enumerate(tokens):
        for key, (other, place) in enumerate(tokens):
            if what == other == "text":
                weights[query, key] = float(at == place)
            elif what != other:
                concept, where = (at, place) if what == "text" else (place, at)
                weights[query, key] = masks_NHW[concept].flatten()[where]
    return weights


@torch.no_grad()
def test_attention_is_that_of_an_explicit_softmax(policy: FlowPipelinePolicy) -> None:
    """The oracle: every exponential of a logit times its weight, over their sum."""
    policy.settings = replace(policy.settings, guidance=0.0)
    masks_NHW = torch.rand(3, GRID, GRID, generator=torch.Generator().manual_seed(0)).pow(3)
    masks_NHW[0, 0] = 0
    masks_NHW = masks_NHW / masks_NHW.sum(dim=0)
    rows = by_masks(policy, masks_NHW, [OWL, SNAIL, CAT])
    total = rows.tokens_BLD.shape[1]
    is_text_first = not isinstance(policy, SD3Policy)
    weights_QK = weighed(masks_NHW, total // 3, is_text_first)
    if isinstance(policy, SDXLPolicy):  # images ask, texts answer
        weights_QK = weights_QK[total:, :total]
    for layer in first_attention(policy):
        given, found = seen_by(policy, rows, layer)
        query, key, value = projected(layer, given, is_text_first)
        logits = query @ key.mT / query.shape[-1] ** 0.5
        powers = (logits - logits.amax(dim=-1, keepdim=True)).exp() * weights_QK
        mixed = (powers @ value / powers.sum(dim=-1, keepdim=True)).transpose(1, 2).flatten(2)
        if isinstance(found, Tensor):  # FLUX's tokens in one sequence are projected by the block
            expected = mixed if getattr(layer, "to_out", None) is None else layer.to_out[0](mixed)
            assert agree(found, expected, MODEL)
            continue
        pixels = slice(total, None) if is_text_first else slice(0, GRID * GRID)
        texts = slice(0, total) if is_text_first else slice(GRID * GRID, None)
        assert agree(found[0], layer.to_out[0](mixed[:, pixels]), MODEL)
        assert agree(found[1], layer.to_add_out(mixed[:, texts]), MODEL)


def test_other_attention_is_left_alone(folders: dict[str, Path]) -> None:
    """SD3.5's second attention, over the image alone, and the image's attention to itself in SDXL's UNet."""
    for name, ending in (("sd3", "attn2"), ("sdxl", "attn1")):
        policy = load(folders[name])
        policy.settings = replace(policy.settings, guidance=0.0)
        layer: Any = next(one for path, one in policy.denoiser.named_modules() if path.endswith(ending))
        given, found = seen_by(policy, by_masks(policy, halves(), [OWL, SNAIL]), layer)
        with torch.no_grad():
            query, key, value = projected(layer, {"hidden_states": given["hidden_states"]}, False)
            plain = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
            assert agree(found, layer.to_out[0](plain.transpose(1, 2).flatten(2)), MODEL)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (70, 90)])
def test_masks_of_any_size_are_scaled_to_the_tokens(size: tuple[int, int]) -> None:
    masks_BNHW = torch.rand(2, 3, 64, 64).softmax(dim=1)
    masks_BNHW[0, 0] = torch.arange(64)[:, None] < 32  # the upper half
    masks_BNHW[0, 1] = 1 - masks_BNHW[0, 0]
    masks_BNHW[0, 2] = 0
    weights = text_bias(Conditioning(torch.zeros(2, 6, 1), regions_BNHW=masks_BNHW), size).exp()
    assert weights.shape == (2, 6, size[0] * size[1])
    assert torch.equal(weights[:, ::2], weights[:, 1::2])  # two tokens a prompt
    assert agree(weights[:, ::2].sum(dim=1), torch.ones(2, size[0] * size[1]), 64)
    first, second, third = weights[0, ::2].unflatten(1, size)
    assert agree(first[0], torch.ones(size[1]), 64) and bool((first[-1] == 0).all())
    assert agree(first.flip(0), second, 64) and bool((third == 0).all())


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_leads_away_from_the_models_own_unconditional(name: str, folders: dict[str, Path]) -> None:
    policy = load(folders[name])
    mixed = divided(policy, [[0.4, 0.6], [0.5, 0.5], [0.7, 0.3]], [OWL, SNAIL])
    found = {}
    for scale in (0.0, 4.0):
        policy.settings = replace(policy.settings, guidance=scale)
        found[scale] = velocity(policy, mixed)
    policy.settings = replace(policy.settings, guidance=0.0)
    away = velocity(policy, policy._unconditional(3))
    assert agree(found[4.0], away + 4 * (found[0.0] - away), MODEL, scale=4 * float(found[0.0].abs().max()))


def test_a_picture_depends_on_its_own_row_alone(policy: FlowPipelinePolicy) -> None:
    policy.settings = replace(policy.settings, steps=2)
    mixed = divided(policy, [[0.1, 0.2, 0.7], [0.5, 0.2, 0.3], [0.0, 0.8, 0.2]], [OWL, SNAIL, CAT])
    together = policy.sample(mixed, SEEDS)
    policy.micro_batch = 1
    assert agree(policy.sample(mixed, SEEDS), together, PICTURE)
    assert agree(policy.sample(mixed[1:], SEEDS[1:]), together[1:], PICTURE)
    assert agree(policy.sample(mixed[[2, 0]], [3, 1]), together[[2, 0]], PICTURE)


def test_regions_cost_one_pass_a_step(policy: FlowPipelinePolicy) -> None:
    policy.settings = replace(policy.settings, steps=2, guidance=0.0)
    asked: list[int] = []
    policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    policy.sample(divided(policy, EACH, [OWL, SNAIL, CAT]), SEEDS)
    assert asked == [3, 3]


def test_nothing_stays_behind(policy: FlowPipelinePolicy) -> None:
    """After a pass by region, and after one that failed, the model draws as before."""
    alone = policy.encode([OWL])
    before = velocity(policy, alone)
    mixed = divided(policy, [[0.5, 0.5]], [OWL, SNAIL])
    velocity(policy, mixed)
    with pytest.raises(ShapeError):
        velocity(policy, replace(mixed, tokens_BLD=mixed.tokens_BLD[:, 1:]))
    assert torch.equal(velocity(policy, alone), before)


def test_a_gradient_reaches_the_text_of_its_own_region(policy: FlowPipelinePolicy) -> None:
    policy.settings = replace(policy.settings, guidance=0.0)
    mixed = divided(policy, [[0.5, 0.5, 0.0]], [OWL, SNAIL, CAT])
    tokens = mixed.tokens_BLD.clone().requires_grad_()
    x, t = policy.initial_noise([1]), torch.tensor([0.5])
    found = policy.velocity(x, t, replace(mixed, tokens_BLD=tokens))
    (slope,) = torch.autograd.grad(found.square().sum(), tokens)
    of_each = slope[0].unflatten(0, (3, -1)).abs().amax(dim=(1, 2))
    assert bool(slope.isfinite().all()) and bool((of_each[:2] > 0).all()) and of_each[2] == 0


def test_rows_keep_their_regions() -> None:
    regions = torch.rand(3, 2, 4, 4)
    rows = Conditioning(torch.rand(3, 6, 5), regions_BNHW=regions)
    for chosen in (slice(1, 3), [2, 0], torch.tensor([1])):
        assert torch.equal(rows[chosen].regions_BNHW, regions[chosen])
    assert torch.equal(Conditioning.cat([rows[:1], rows[1:]]).regions_BNHW, regions)
    halved = rows.to(device="cpu", dtype=torch.bfloat16)
    assert halved.tokens_BLD.dtype is torch.bfloat16 and torch.equal(halved.regions_BNHW, regions)
    moved = rows.to(device="meta").regions_BNHW
    assert moved is not None and moved.is_meta
    plain = Conditioning(torch.rand(2, 3, 5))
    filled = plain.in_regions_of(rows)
    assert torch.equal(filled.tokens_BLD, plain.tokens_BLD.repeat(1, 2, 1))
    assert filled.regions_BNHW is not None and filled.regions_BNHW.shape == (2, 2, 4, 4)
    assert bool((filled.regions_BNHW[:, 0] == 1).all() and (filled.regions_BNHW[:, 1] == 0).all())
    assert plain.in_regions_of(plain) is plain
    for others in (plain, replace(rows, regions_BNHW=torch.rand(3, 2, 8, 8))):
        with pytest.raises(ShapeError, match="cat: regions of"):
            Conditioning.cat([rows, others])
    for refused in (
        lambda: rows.mix(torch.ones(3)),
        lambda: rows.lerp(rows, 0.5),
        lambda: plain.lerp(rows[:2], 0.5),
    ):
        with pytest.raises(ShapeError, match="rows with regions hold several prompts"):
            refused()


def test_what_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    flux = load(folders["flux"])
    mixed = divided(flux, [[0.5, 0.5]], [OWL, SNAIL])
    with pytest.raises(ShapeError, match=re.escape("for tokens [1, 95, 32]; give masks [B, N, H, W]")):
        velocity(flux, replace(mixed, tokens_BLD=mixed.tokens_BLD[:, 1:]))
    with pytest.raises(InputError, match="1 reference pictures beside regions"):
        velocity(flux, replace(mixed, references=(torch.zeros(1, 4, 8, 8),)))
    sdxl = load(folders["sdxl"])
    odd = divided(sdxl, [[0.5, 0.5]], [OWL, SNAIL])
    with pytest.raises(ShapeError, match="give masks"):
        velocity(sdxl, replace(odd, tokens_BLD=odd.tokens_BLD[:, 1:]))


def test_what_would_run_without_the_regions_is_refused(folders: dict[str, Path]) -> None:
    for name in GUIDED:
        policy = load(folders[name])
        mixed = divided(policy, [[0.5, 0.5]], [OWL, SNAIL])
        policy.checkpoint_gradients()
        velocity(policy, mixed)  # without gradients nothing is computed twice
        with pytest.raises(InputError, match="does not reach gradient checkpointing"):
            policy.velocity(policy.initial_noise([1]), torch.tensor([0.5]), mixed)
        policy.compiled = True
        with pytest.raises(InputError, match="does not reach compiled blocks"):
            velocity(policy, mixed)


class Slow:
    """Attention over text and image by plain products, which nothing can put a bias into."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        return hidden_states, encoder_hidden_states


def test_attention_by_another_function_is_refused(folders: dict[str, Path]) -> None:
    policy = models.load(tiny.sd3(folders["sd3"].parent / "single", card=tiny.SD3_CARD), device="cpu")
    assert isinstance(policy, SD3Policy)
    for block in policy.denoiser.transformer_blocks:  # type: ignore[union-attr]
        block.attn.set_processor(Slow())
    with pytest.raises(RunError, match="not reached"):
        velocity(policy, divided(policy, [[0.5, 0.5]], [OWL, SNAIL]))


def test_an_adapter_that_does_not_attend_by_region_refuses(folders: dict[str, Path]) -> None:
    class Plain(SD3Policy):
        reads_regions = False

    policy = load(folders["sd3"])
    mixed = divided(policy, [[0.5, 0.5]], [OWL, SNAIL])
    policy.__class__ = Plain
    with pytest.raises(InputError, match="cannot attend by region: its adapter Plain takes one prompt"):
        velocity(policy, mixed)
    with pytest.raises(InputError, match="has no attention by region"):
        policy.sample(mixed, [1])
    with pytest.raises(InputError, match="has no attention by region"):
        check_pairs(mixed, [1])
    check_pairs(mixed, [1], by_region=True)
    readers = {name for name in models.RENDERERS if models.REGISTRY.find(name).reads_regions}
    assert readers == set(FAMILIES)


def test_the_doctor_refuses_before_a_model_loads(tmp_path: Path) -> None:
    folder = tiny_language.z_image(tmp_path / "z")
    config = FuseConfig(concepts=("owl", "snail"), model=str(folder), mixing=RegionsSettings())
    found = examine_fusion(config, about_to_run=True)
    assert any("adapter ZImagePolicy takes one prompt a picture" in one.message for one in found.problems)


def test_an_adapter_that_says_it_attends_by_region_is_checked(folders: dict[str, Path]) -> None:
    check_renderer(load(folders["sdxl"]), (OWL, SNAIL))
