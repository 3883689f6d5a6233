"""Which engine runs a job, and which models the compiled one may run, packed when they change."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
from mygpt import GPTConfig, SamplingConfig, Writer, generate, stream
from mygpt.core.model import MLP
from mygpt.core.random import Stream
from mygpt.cpu.common import build as kernels
from mygpt.cpu.decode.engine import CpuEngine, digest_of
from mygpt.cpu.train.step import suits
from mygpt.decode import choice, packing
from mygpt.decode.choice import DTYPES, ENGINES, choose_engine
from mygpt.decode.packing import cpu_engine_of, packable_parameters
from mygpt.engine import Request, only_in_torch
from mygpt.errors import InputError
from mygpt.tokenization import CharTokenizer
from shapes import LLAMA, MODERN, TUTORIAL, build, own_forward, unchecked

PROMPT = torch.tensor([[1, 4, 0]])
LARGE = GPTConfig(1000, 512, 8, 12, max_seq_len=64)

# --- the choice ----------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets the machine's properties."""

    def is_(*, compiled=True, available=True, gpu=False):
        monkeypatch.setattr(kernels, "has_machine_code", lambda: compiled)
        monkeypatch.setattr(choice, "cpu_engine_available", lambda: available)
        monkeypatch.setattr(choice, "may_have_gpu", lambda: gpu)

    is_()
    return is_


WANTED = {
    ("numpy", "auto", "float32"): "numpy",
    ("numpy", "cpu", "float32"): "numpy",
    ("numpy", "cuda", "float32"): "engine=numpy runs on the CPU: use --engine torch for cuda",
    ("numpy", "auto", "int8"): "engine=numpy has no dtype int8: use float32",
    ("numpy", "auto", "bfloat16"): "engine=numpy has no dtype bfloat16: use float32",
    ("cpu", "auto", "float32"): "cpu",
    ("cpu", "cpu", "int8"): "cpu",
    ("cpu", "cuda:1", "float32"): "engine=cpu runs on the CPU: use --engine torch for cuda:1",
    ("cpu", "auto", "float16"): "engine=cpu has no dtype float16: use float32 or int8",
    ("torch", "auto", "float32"): "torch",
    ("torch", "cuda", "bfloat16"): "torch",
    ("torch", "cpu", "int8"): "dtype=int8 works only with the cpu engine",
    ("auto", "auto", "int8"): "cpu",
    ("auto", "cuda", "int8"): "engine=cpu runs on the CPU",
    ("auto", "auto", "bfloat16"): "torch",
    ("auto", "cpu", "float16"): "torch",
    ("auto", "cuda", "float32"): "torch",
    ("auto", "mps", "float32"): "torch",
    ("auto", "cpu", "float32"): "cpu",
    ("auto", "auto", "float32"): "cpu",
    ("jax", "auto", "float32"): "engine='jax'",
    ("auto", "auto", "int3"): "dtype='int3'",
}


@pytest.mark.parametrize(("asked", "expected"), WANTED.items(), ids=str)
def test_a_requested_engine_is_chosen_or_refused(machine, asked, expected):
    """The error names an engine that would work."""
    wanted, device, dtype = asked
    options = {"tokens": 10, "device": device, "dtype": dtype, "wanted": wanted}
    if expected in ENGINES:
        assert choose_engine(TUTORIAL, **options).name == expected
    else:
        with pytest.raises(InputError, match=expected):
            choose_engine(TUTORIAL, **options)


def test_without_numba_the_engine_is_numpy(machine):
    machine(available=False)
    for tokens in (1, 10**9):
        assert choose_engine(TUTORIAL, tokens=tokens).name == "numpy"
    for options in ({"wanted": "cpu"}, {"dtype": "int8"}):
        with pytest.raises(InputError, match=r"POSIX system \(on Windows: WSL\): install numba"):
            choose_engine(TUTORIAL, tokens=10, **options)


@pytest.mark.parametrize("config", [TUTORIAL, LARGE], ids=["small", "large"])
def test_only_long_jobs_wait_for_the_compiler(machine, config):
    """Longer than some seconds of NumPy's; machine code that is ready serves the shortest too."""
    machine(compiled=False)
    names = [choose_engine(config, tokens=2**n).name for n in range(30)]
    turn = names.index("cpu")
    assert names == ["numpy"] * turn + ["cpu"] * (30 - turn)
    assert turn > 4
    seconds = 2**turn * (3e-4 + config.num_parameters() / 5e9)
    assert 4 < seconds < 20
    machine(compiled=True)
    assert choose_engine(config, tokens=1).name == "cpu"


def test_small_models_stay_off_the_gpu(machine):
    machine(gpu=True)
    assert LARGE.num_parameters() > 30_000_000
    assert choose_engine(LARGE, tokens=10).name == "torch"
    assert choose_engine(LARGE, tokens=10, device="cpu").name == "cpu"
    assert choose_engine(TUTORIAL, tokens=10).name == "cpu"


def test_each_choice_has_its_reason(machine):
    """The end of a sentence, different for each choice."""
    cases = [{"wanted": name} for name in ENGINES] + [{"dtype": name} for name in DTYPES]
    reasons = [choose_engine(TUTORIAL, tokens=1, **case).reason for case in cases]
    machine(compiled=False)
    reasons += [choose_engine(TUTORIAL, tokens=n).reason for n in (1, 10**9)]
    machine(available=False)
    reasons.append(choose_engine(TUTORIAL, tokens=1).reason)
    assert all(reason and reason[-1] != "." for reason in reasons)
    assert len(set(reasons)) == 9


BLOCK = GPTConfig(5, 32, 2, 2, max_seq_len=12)


@dataclass(frozen=True)
class Wider(GPTConfig):
    """A shape with an option that is new."""

    parallel: bool = False


NEW = {
    "norm=deep": unchecked(BLOCK, norm="deep"),
    "position=alibi": unchecked(BLOCK, position="alibi"),
    "mlp=relu": unchecked(BLOCK, mlp="relu"),
    "parallel=True": Wider(5, 32, 2, 2, max_seq_len=12, parallel=True),
}


@pytest.mark.parametrize("option", NEW)
def test_a_block_that_is_only_in_core_is_run_by_torch_alone(machine, option):
    """An unknown position encoding was run without positions."""
    config, model = NEW[option], build(BLOCK)
    assert suits(BLOCK)
    assert packable_parameters(model) is not None
    assert only_in_torch(Wider(5, 32, 2, 2)) is None
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
        if isinstance(module, MLP):
            module.kind = config.mlp
    assert not suits(config)
    assert packable_parameters(model) is None
    assert choose_engine(config, tokens=10**9, device="cpu").name == "torch"
    assert choose_engine(config, tokens=1, wanted="torch").name == "torch"
    for asked in ({"wanted": "numpy"}, {"wanted": "cpu"}, {"dtype": "int8"}):
        with pytest.raises(InputError, match=f"only torch implements {option}"):
            choose_engine(config, tokens=1, **asked)
    w = Writer(model, CharTokenizer("abcde"))
    assert w.backend.choose(1).name == "torch"
    with pytest.raises(InputError, match=f"only torch implements {option}"):
        w.read([1])


def test_choosing_imports_neither_torch_nor_numba():
    program = """
import sys
from mygpt.core.config import GPTConfig
from mygpt.decode.choice import choose_engine
print(choose_engine(GPTConfig(5, 8, 2, 2), tokens=10**9, device="cpu").name)
assert not {"torch", "numba"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


# --- which models are packed ---------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many rows each job of the cpu engine has."""
    sizes, start = [], CpuEngine.start

    def watched(self, requests):
        sizes.append(len(requests))
        return start(self, requests)

    monkeypatch.setattr(CpuEngine, "start", watched)
    return sizes


@pytest.mark.kernels
@pytest.mark.parametrize("config", [TUTORIAL, MODERN], ids=["tutorial", "modern"])
def test_the_compiled_engine_does_the_chapters_loop(decoded, config):
    """After `set_seed`, with torch's own draws between its steps, past the window."""
    model = build(config, spread=0.7)
    assert packable_parameters(model) is not None
    assert choose_engine(config, tokens=60, device="cpu").name == "cpu"
    prompt = torch.tensor([[1, 4, 0], [2, 2, 2]])
    for top_k in (None, 3):
        torch.manual_seed(3)
        expected = reference.chapter_generate(model, prompt, 30, 0.9, top_k)
        torch.manual_seed(3)
        assert torch.equal(generate(model, prompt, 30, 0.9, top_k), expected)
        torch.manual_seed(3)
        steps = list(stream(model, prompt, 30, 0.9, top_k))
        assert torch.equal(torch.stack(steps, dim=1), expected[:, 3:])
    assert decoded == [2] * 4


def expected_of(model, seed=1) -> list[int]:
    return reference.seeded_generate(model, PROMPT[0].tolist(), 20, SamplingConfig(), seed, 0)


def written(model, seed=1) -> list[int]:
    return generate(model, PROMPT, 20, seed=seed)[0].tolist()


def compiled_logits(model) -> np.ndarray:
    request = Request(PROMPT[0].numpy(), 1, SamplingConfig(), Stream(0))
    decoding = cpu_engine_of(model).start([request])
    decoding.advance(1)
    return decoding.logits(0).copy()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(PROMPT)[0][0, -1].numpy()


class Doubled(MLP):
    """An MLP that a learner changed."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_subclassed_mlp(model) -> None:
    mlp = Doubled(TUTORIAL).eval()
    mlp.load_state_dict(model.blocks[0].mlp.state_dict())
    model.blocks[0].mlp = mlp


def patched(owner, after) -> None:
    """`after` changes what the module's forward method returns."""
    inner = owner.forward
    owner.forward = lambda *args, **options: after(inner(*args, **options))


def with_foreign_module(model) -> None:
    model.blocks[0].mlp.output = nn.Sequential(model.blocks[0].mlp.output, nn.Tanh())


def with_parametrization(model) -> None:
    nn.utils.parametrize.register_parametrization(model.blocks[0].mlp.input, "weight", nn.Tanh())


CHANGED = {
    "a subclassed MLP": with_subclassed_mlp,
    "a patched MLP": lambda model: patched(model.blocks[0].mlp, lambda out: 2 * out),
    "another forward": lambda model: own_forward(),
    "a patched forward": lambda model: patched(model, lambda out: (out[0].flip(-1), None)),
    "a hook": lambda model: model.blocks[1].mlp.register_forward_hook(lambda *args: 2 * args[2]),
    "an early hook": lambda model: model.final_norm.register_forward_pre_hook(
        lambda module, args: (args[0].flip(-1),)
    ),
    "a foreign module": with_foreign_module,
    "a parametrization": with_parametrization,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_changed_model_is_not_packed_and_writes_as_it_is(change):
    model = build(TUTORIAL)
    made = change(model)
    model = made if isinstance(made, nn.Module) else model
    assert np.abs(torch_logits(model) - torch_logits(build(TUTORIAL))).max() > 0.1
    assert packable_parameters(model) is None
    assert written(model) == expected_of(model)


def test_hooks_see_each_step():
    """Hooks that record activations are called at every step."""
    model, seen = build(TUTORIAL), []
    handle = model.final_norm.register_forward_hook(lambda *args: seen.append(1))
    written(model)
    assert len(seen) == 20
    handle.remove()
    assert packable_parameters(model) is not None


def test_other_number_formats_and_missing_engines_are_not_packed(monkeypatch):
    assert packable_parameters(build(TUTORIAL)) is not None
    assert packable_parameters(build(TUTORIAL).double()) is None
    assert packable_parameters(build(TUTORIAL).bfloat16()) is None
    assert packable_parameters(build(TUTORIAL).to("meta")) is None
    assert packable_parameters(nn.Linear(2, 2)) is None
    partly = build(TUTORIAL)
    partly.final_norm.double()
    assert packable_parameters(partly) is None
    monkeypatch.setattr(packing, "cpu_engine_available", lambda: False)
    assert packable_parameters(build(TUTORIAL)) is None


def with_another_eps(model) -> None:
    model.final_norm.eps = model.blocks[0].mlp_norm.eps = 10.0


REBUILT = {
    "a shared MLP": (lambda model: setattr(model.blocks[1], "mlp", model.blocks[0].mlp), TUTORIAL),
    "a tied head": (
        lambda model: setattr(model.head, "weight", model.token_embedding.weight),
        LLAMA,
    ),
    "fewer blocks": (lambda model: setattr(model, "blocks", model.blocks[:1]), TUTORIAL),
    "another eps": (with_another_eps, TUTORIAL),
    "other angles": (lambda model: model.rotary_cos.fill_(0.3), MODERN),
}


@pytest.mark.kernels
@pytest.mark.parametrize(("change", "config"), REBUILT.values(), ids=REBUILT)
def test_a_rebuilt_model_writes_as_it_is(change, config):
    """A learner's experiments on a built model: whichever engine runs it, the model decides."""
    model = build(config, spread=0.7)
    change(model)
    assert written(model) == expected_of(model)
    if packable_parameters(model) is not None:
        assert np.abs(compiled_logits(model) - torch_logits(model)).max() < 1e-4


# --- when they are packed again ------------------------------------------------------------


def step_of_an_optimizer(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(PROMPT, PROMPT)[1].backward()
    optimizer.step()


def swapped(model) -> None:
    weight = model.token_embedding.weight.data
    weight[[1, 2]] = weight[[2, 1]]


def transposed(model) -> None:
    weight = model.token_embedding.weight
    weight.data = (3 * weight.data).T.contiguous().T


def other_weights() -> dict[str, torch.Tensor]:
    return build(TUTORIAL, seed=5, spread=0.7).state_dict()


CHANGES = {
    "a step of an optimizer": step_of_an_optimizer,
    "through data": lambda model: model.blocks[1].attention.output.weight.data[0].add_(3),
    "new data": lambda model: setattr(model.final_norm.weight, "data", torch.linspace(-2, 2, 8)),
    "loaded": lambda model: model.load_state_dict(other_weights()),
    "assigned": lambda model: model.load_state_dict(other_weights(), assign=True),
    "swapped": swapped,
    "swapped blocks": lambda model: setattr(model, "blocks", nn.ModuleList(reversed(model.blocks))),
    "negated": lambda model: model.final_norm.bias.data.neg_(),
    "copied": lambda model: model.position_embedding.weight.detach().copy_(torch.randn(12, 8)),
    "through NumPy": lambda model: np.add.at(
        model.blocks[0].mlp.output.bias.detach().numpy(), np.arange(4), 2
    ),
    "transposed": transposed,
}


@pytest.mark.kernels
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_write(change):
    """However they were changed."""
    model = build(TUTORIAL, spread=0.7)
    first, before = cpu_engine_of(model), compiled_logits(model)
    written(model)
    change(model)
    assert packable_parameters(model) is not None
    assert np.abs(compiled_logits(model) - before).max() > 0.01
    assert np.abs(compiled_logits(model) - torch_logits(model)).max() < 1e-4
    assert written(model) == expected_of(model)
    second = cpu_engine_of(model)
    assert second is not first
    written(model)
    assert cpu_engine_of(model) is second, "unchanged weights are not packed again"


@pytest.mark.kernels
def test_every_weight_of_a_strided_tensor_is_compared():
    """Every second column of a wider tensor: the others do not belong to the model."""
    model = build(TUTORIAL, spread=0.7)
    wide = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model.token_embedding.weight.data = wide[:, ::2]
    first = cpu_engine_of(model)
    wide[:, 1::2] += 3
    assert cpu_engine_of(model) is first
    wide[4, 14] += 3
    assert cpu_engine_of(model) is not first
    assert np.abs(compiled_logits(model) - torch_logits(model)).max() < 1e-4


def test_a_writer_uses_new_weights():
    model = build(TUTORIAL, spread=0.7)
    w = Writer(model, CharTokenizer("abcde"))
    before = w.complete("be", 20, seed=1)[0].token_ids
    step_of_an_optimizer(model)
    found = w.complete("bea", 20, seed=1)[0].token_ids
    assert [1, 4, 0, *found] == expected_of(model)
    assert found != before


@pytest.mark.kernels
def test_each_model_has_its_own_engine_that_is_deleted_with_it():
    """Copies too; nothing keeps weights of a deleted model."""
    import copy

    one = build(TUTORIAL, spread=0.7)
    other = copy.deepcopy(one)
    assert cpu_engine_of(one) is not cpu_engine_of(other)
    assert cpu_engine_of(one) is cpu_engine_of(one)
    other.final_norm.weight.data *= 2
    assert written(one) == expected_of(one)
    assert written(other) == expected_of(other)
    left = [weakref.ref(one), weakref.ref(cpu_engine_of(one))]
    del one
    gc.collect()
    assert [ref() for ref in left] == [None, None]


# --- digests -------------------------------------------------------------------------------


def digest(*arrays: np.ndarray) -> int:
    return digest_of([(array.ctypes.data, array.size) for array in arrays])


sizes = st.lists(st.integers(1, 70), min_size=1, max_size=4)


@pytest.mark.kernels
@given(sizes, st.integers(0, 2**32), st.data())
def test_any_change_of_any_weight_is_noticed(lengths, seed, data):
    """One bit, two numbers or two arrays exchanged; memory around them does not matter."""
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(size=n).astype(np.float32) for n in lengths]
    before = digest(*arrays)
    assert digest(*[array.copy() for array in arrays]) == before
    array = arrays[data.draw(st.integers(0, len(arrays) - 1))]
    place, bit = data.draw(st.integers(0, array.size - 1)), data.draw(st.integers(0, 31))
    array.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert digest(*arrays) != before
    array.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert digest(*arrays) == before
    other = data.draw(st.integers(0, array.size - 1))
    if place != other:
        array[[place, other]] = array[[other, place]]
        assert digest(*arrays) != before
        array[[place, other]] = array[[other, place]]
    for i in range(1, len(arrays)):
        assert digest(*arrays[:i]) != before
        assert digest(arrays[i], *arrays[1:i], arrays[0], *arrays[i + 1 :]) != before


def negate(weights, places) -> None:
    weights[places] *= -1


def exchange(weights, places) -> None:
    weights[places] = np.roll(weights[places], 1)


def double_and_halve(weights, places) -> None:
    weights[places[0]] *= 2
    weights[places[1]] /= 2


@pytest.mark.kernels
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("change", [negate, exchange, double_and_halve])
def test_changes_of_several_numbers_do_not_cancel(change, count):
    """Two thousand random ones are all noticed: changes of sign cancelled in every second pair."""
    generator = np.random.default_rng(0)
    unseen = 0
    for _ in range(2000):
        weights = generator.normal(size=64).astype(np.float32)
        places = generator.choice(64, count, replace=False)
        weights[places[0]] = -weights[places[1]]  # of one size, with two signs
        before = digest(weights)
        change(weights, places)
        unseen += digest(weights) == before
    assert unseen == 0


@pytest.mark.kernels
def test_numbers_around_an_array_are_not_compared():
    weights = np.arange(10, dtype=np.float32)
    before = digest(weights[2:8])
    weights[[1, 8]] = 99
    assert digest(weights[2:8]) == before
    assert digest_of([]) == digest_of([])
