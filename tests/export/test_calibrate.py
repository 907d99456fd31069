"""Calibration against hooks on transformers' whole model, and the memory that it takes."""

from __future__ import annotations

import hashlib
import math
import re
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatework.export.calibrate import calibrate
from gatework.export.calibration import dense_products
from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import load_decoder
from gatework.export.smoothing import balance_columns, balance_norm, balanced_products, smoothing_factors
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint, reference_model
from tests.switch import Oracle as SwitchOracle
from tests.switch import make_switch

# float32, 2 layers: rounding of sums in another order stays below 1e-6; an error of meaning shows at 1e-3 and more.
RELATIVE = 1e-5
WINDOW = 16
IDS = np.random.default_rng(0).integers(0, 128, 50).tolist()  # three whole windows and one of two tokens
LAYERS = 2

# transformers' linear layers, by the end of their names, and the canonical weights that they hold.
LINEARS = {
    "q_proj": ["attn.q.weight"],
    "k_proj": ["attn.k.weight"],
    "v_proj": ["attn.v.weight"],
    "Wqkv": ["attn.q.weight", "attn.k.weight", "attn.v.weight"],
    "o_proj": ["attn.o.weight"],
    "out_proj": ["attn.o.weight"],
    "mlp.gate_proj": ["mlp.w_in"],
    "mlp.up_proj": ["mlp.w_in"],
    "mlp.down_proj": ["mlp.w_out"],
    "self_attn.dense": ["attn.o.weight"],
    "mlp.fc1": ["mlp.w_in"],
    "mlp.fc2": ["mlp.w_out"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {}),
    "tied": ("llama2", {"tie_embeddings": True}),
    "mistral": ("mistral", {}),  # with a sliding window of 4
    "mixtral": ("mixtral", {"dtype": torch.bfloat16}),
    "dbrx": ("dbrx", {}),
    "phi": ("phi", {}),
}


class Oracle:
    """Inputs [T, D] and largest weights by column [D] of all dense products, from transformers' float32 model."""

    def __init__(self, path: Path) -> None:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        columns: dict[str, list[Tensor]] = defaultdict(list)
        model = reference_model(path)
        for module_name, module in model.named_modules():
            for name in canonical(module_name):
                columns[name].append(module.weight.detach().abs().amax(0))
                if not module_name.endswith("up_proj"):  # its input is gate_proj's
                    module.register_forward_pre_hook(
                        lambda module, args, found=parts[name]: found.append(args[0].flatten(0, 1))
                    )
        with torch.inference_mode():
            for start in range(0, len(IDS), WINDOW):
                model(torch.tensor([IDS[start : start + WINDOW]]))
        self.inputs = {name: torch.cat(found).abs().numpy() for name, found in parts.items()}
        self.columns = {name: torch.stack(found).amax(0).numpy() for name, found in columns.items()}


def canonical(module: str) -> list[str]:
    """Canonical names of the dense weights in one of transformers' modules."""
    if module == "lm_head":
        return ["lm_head.weight"]
    layer = re.search(r"\.(\d+)\.", module)
    return [
        f"layers.{layer[1]}.{name}"
        for end, names in LINEARS.items()
        if layer and module.endswith(end)
        for name in names
    ]


def assert_close(got: float, want: float, what: str) -> None:
    error = abs(got - want) / abs(want)
    assert error <= RELATIVE, f"{what}: {got} for {want}, off by {error:.2e}, tolerance {RELATIVE:.0e}"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Oracle]:
    model, options = CASES[request.param]
    path = make_checkpoint(tmp_path_factory.mktemp(request.param), model, seed=3, **options)
    return Checkpoint.open(path), Oracle(path)


def expected_names(checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """Products and norms, spelt out."""
    products, norms = {"lm_head.weight"}, {"norm.weight"}
    for i in range(LAYERS):
        products |= {f"layers.{i}.attn.{name}.weight" for name in "qkvo"}
        norms.add(f"layers.{i}.attn_norm.weight")
        if checkpoint.config.moe is None:
            products |= {f"layers.{i}.mlp.w_in", f"layers.{i}.mlp.w_out"}
            if not checkpoint.config.parallel:
                norms.add(f"layers.{i}.ffn_norm.weight")
    return products, norms


@pytest.mark.parametrize("percentile", [99.99, 99.0, 40.0, 100.0])
def test_ranges_equal_those_of_hooks(case: tuple[Checkpoint, Oracle], percentile: float) -> None:
    checkpoint, oracle = case
    found = calibrate(checkpoint, IDS, window=WINDOW, percentile=percentile)
    products, _ = expected_names(checkpoint)
    assert found.ranges.keys() == products == set(dense_products(checkpoint.config)) == oracle.inputs.keys()
    for name, x in oracle.inputs.items():
        assert_close(found.ranges[name].absmax, x.max(), f"absmax of {name}")
        assert_close(found.ranges[name].percentile, np.percentile(x, percentile), f"percentile of {name}")
    assert (found.tokens, found.window, found.alpha, found.smooth) == (50, WINDOW, None, {})
    assert found.fingerprint == checkpoint.fingerprint()
    assert found.text_sha256 == hashlib.sha256(" ".join(map(str, IDS)).encode()).hexdigest()


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_balancing(case: tuple[Checkpoint, Oracle], alpha: float) -> None:
    """Factors by the paper's formula, and ranges of the balanced inputs, on the oracle's activations and weights."""
    checkpoint, oracle = case
    found = calibrate(checkpoint, IDS, window=WINDOW, smooth=alpha)
    products, norms = expected_names(checkpoint)
    fed = balanced_products(checkpoint.config)
    assert found.smooth.keys() == norms == fed.keys()
    assert found.ranges.keys() == products
    balanced = dict(oracle.inputs)
    for norm, names in fed.items():
        x = oracle.inputs[names[0]]
        want = x.max(0) ** alpha / np.max([oracle.columns[name] for name in names], 0) ** (1 - alpha)
        assert np.abs(np.array(found.smooth[norm]) / want - 1).max() <= RELATIVE, norm
        balanced |= dict.fromkeys(names, x / want)
    for name, x in balanced.items():
        assert_close(found.ranges[name].absmax, x.max(), f"absmax of {name}")
        assert_close(found.ranges[name].percentile, np.percentile(x, 99.99), f"percentile of {name}")


SWITCH = {"SelfAttention": "attn", "EncDecAttention": "cross", "mlp.wi": "mlp.w_in", "mlp.wo": "mlp.w_out"}


@torch.inference_mode()
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_encoder_and_its_decoder(tmp_path: Path, alpha: float | None) -> None:
    """The encoder reads the first half of each window, the decoder goes along the rest, token by token: no expert is full."""
    path = make_switch(tmp_path, expert_capacity=8)
    checkpoint, model = Checkpoint.open(path), SwitchOracle(path).model
    inputs, columns = defaultdict(list), {}
    for module_name, module in model.named_modules():
        if (name := switch_product(module_name)) is not None:
            columns[name] = module.weight.abs().amax(0)
            scale = 8 if name == "lm_head.weight" else 1  # transformers scales its input, not the logits
            module.register_forward_pre_hook(
                lambda module, args, found=inputs[name], scale=scale: found.append(scale * args[0].flatten(0, 1))
            )
    for start in range(0, len(IDS), WINDOW):
        prompt, rest = torch.tensor([IDS[start : start + WINDOW]]).tensor_split(2, dim=1)
        model(input_ids=prompt, decoder_input_ids=torch.cat((torch.zeros(1, 1, dtype=torch.int64), rest), 1))
    xs = {name: torch.cat(found).abs().numpy() for name, found in inputs.items()}
    found, fed = calibrate(checkpoint, IDS, window=WINDOW, smooth=alpha), balanced_products(checkpoint.config)
    assert len(xs) == 2 * 4 + 2 * 8 + 2 * 2 + 1
    assert found.ranges.keys() == xs.keys() == set(dense_products(checkpoint.config))
    assert found.smooth.keys() == ({*fed} if alpha else set())
    assert (
        len(fed) == 2 + 2 * 2 + 2 + 2
    )  # before attention, cross attention and dense MLPs, and the last of both stacks
    for norm, names in fed.items() if alpha else ():
        most = np.max([columns[name].numpy() for name in names], 0)
        want = xs[names[0]].max(0) ** alpha / most ** (1 - alpha)
        assert np.abs(np.array(found.smooth[norm]) / want - 1).max() <= RELATIVE, norm
        xs |= {name: xs[name] / want for name in names}
    for name, x in xs.items():
        assert_close(found.ranges[name].absmax, x.max(), f"absmax of {name}")
        assert_close(found.ranges[name].percentile, np.percentile(x, 99.99), f"percentile of {name}")


def switch_product(module: str) -> str | None:
    """The canonical name of the weight in one of transformers' modules, if its inputs have ranges."""
    if module == "lm_head":
        return "lm_head.weight"
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.(\w+|mlp\.w[io])(\.[qkvo])?", module)
    if match is None or match[3] not in SWITCH or ("Attention" in match[3]) != (match[4] is not None):
        return None
    stack, end = "encoder." if match[1] == "encoder" else "", f"{match[4]}.weight" if match[4] else ""
    return f"{stack}layers.{match[2]}.{SWITCH[match[3]]}{end}"


@torch.inference_mode()
def test_a_balanced_model_is_the_same_model(case: tuple[Checkpoint, Oracle]) -> None:
    checkpoint, _ = case
    decoder = load_decoder(checkpoint, WINDOW, all_logits=True)
    ids, positions = torch.tensor([IDS[:WINDOW]]), torch.arange(WINDOW)[None]
    want, *_ = decoder(ids, positions, positions[:, 0], decoder.empty_cache(1))
    fed = balanced_products(checkpoint.config)
    if checkpoint.config.tie_embeddings:
        del fed["norm.weight"]  # this decoder has one table for both ends; the head alone is a case of the next test
    moved = calibrate(checkpoint, IDS, window=WINDOW, smooth=0.5).smooth
    for norm, names in fed.items():
        replace(decoder, norm, balance_norm(decoder.get_parameter(norm), moved[norm]))
        if checkpoint.config.norm_bias:
            bias = norm.replace(".weight", ".bias")
            replace(decoder, bias, balance_norm(decoder.get_parameter(bias), moved[norm]))
        for name in names:
            replace(decoder, name, balance_columns(decoder.get_parameter(name), moved[norm]))
    got, *_ = decoder(ids, positions, positions[:, 0], decoder.empty_cache(1))
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= RELATIVE, f"max |d| / max |x| = {error:.2e}, tolerance {RELATIVE:.0e}"


def replace(module: nn.Module, name: str, weight: Tensor) -> None:
    old = module.get_parameter(name)
    assert weight.shape == old.shape
    assert not torch.allclose(weight, old)
    old.copy_(weight)


def test_balancing_one_product() -> None:
    """An outlier channel of x, and one of W; channels of zeros in both."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 8, generator=rng), torch.randn(12, 8, generator=rng)
    x[:, 1] *= 100
    w[:, 2] *= 50
    x[:, 3] = 0
    w[:, 4] = 0
    factors = smoothing_factors(x.abs().amax(0), w.abs().amax(0), 0.5)
    assert factors.isfinite().all()
    assert (factors > 0).all()
    s = factors.tolist()
    balanced = x / factors
    # two roundings of a factor each, then sums of 8 terms; the outlier's term is some 300, float32's unit 6e-8 of that
    assert (balanced @ balance_columns(w, s).T - x @ w.T).abs().max() <= 1e-4
    assert torch.equal(balance_norm(torch.ones(8, dtype=torch.bfloat16), s), 1 / factors)
    assert balance_columns(w.bfloat16(), s).dtype == torch.float32
    assert torch.equal(torch.cat([balance_columns(rows, s) for rows in w.split(5)]), balance_columns(w, s))
    # alpha 0.5 meets in the middle: balanced channels of x and W have the same largest value
    live = [0, 1, 2, 5, 6, 7]
    assert torch.allclose(balanced.abs().amax(0)[live], balance_columns(w, s).abs().amax(0)[live])


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize("model", ["llama2", "mixtral"])
def test_one_layer_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, smooth: float | None
) -> None:
    """Bytes that were read from the files and are still alive, at their highest: those of one layer."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, model, num_layers=5))
    alive, peak, read = 0, 0, set()
    rows = Checkpoint.rows

    def free(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def counted(self: Checkpoint, name: str, *span: int) -> Tensor:
        nonlocal alive, peak
        out = rows(self, name, *span)
        weakref.finalize(out.untyped_storage(), free, out.nbytes)
        alive, peak = alive + out.nbytes, max(peak, alive + out.nbytes)
        read.add(name)
        return out

    monkeypatch.setattr(Checkpoint, "rows", counted)
    calibrate(checkpoint, IDS, window=WINDOW, smooth=smooth)
    shapes = checkpoint.config.tensor_shapes()
    assert shapes.keys() - read == (set() if smooth else {"lm_head.weight"})  # the logits are not computed
    assert peak == 4 * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.0."))
    assert alive == 0


def test_the_same_again(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "dbrx")
    first, second = (calibrate(path, IDS, window=WINDOW, smooth=0.5) for _ in range(2))
    assert first == second


def test_the_window_is_the_models_context_at_most(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama2", num_layers=1)
    assert calibrate(path, [1, 2, 3] * 30).window == 64


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the text is too short; got 0 tokens; expected at least 2"),
        ([1], {}, "the text is too short; got 1 tokens; expected at least 2"),
        ([1, 128], {}, "a token id is out of range; got 128; expected 0 to 127"),
        ([1, -1], {}, "a token id is out of range; got -1"),
        ([1, 2], {"window": 1}, "window is out of range; got 1; expected 2 to 64, the model's context"),
        ([1, 2], {"window": 65}, "window is out of range; got 65"),
        ([1, 2], {"smooth": 0.0}, "--smooth is out of range; got 0.0"),
        ([1, 2], {"smooth": 1.0}, "--smooth is out of range; got 1.0"),
        ([1, 2], {"smooth": math.nan}, "--smooth is out of range; got nan"),
        ([1, 2], {"percentile": 0}, "percentile is out of range; got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, ids: list[int], options: dict[str, Any], message: str) -> None:
    path = make_checkpoint(tmp_path, "llama2", num_layers=1)
    with pytest.raises(GateworkError, match=re.escape(message)):
        calibrate(path, ids, **options)


def test_activations_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "llama2")
    rows = Checkpoint.rows

    def broken(self: Checkpoint, name: str, *span: int) -> Tensor:
        return rows(self, name, *span) * (math.inf if name == "layers.1.mlp.w_in" else 1)

    monkeypatch.setattr(Checkpoint, "rows", broken)
    with pytest.raises(GateworkError, match=r"the range of layers\.1\.mlp\.w_out is not valid; got absmax (nan|inf)"):
        calibrate(path, IDS, window=WINDOW)
