"""Which engine runs a job: `choose_engine` selects it by device, number format, size and length.

`Backend` makes the engines of one model, of a checkpoint's arrays or of a torch model as it is now.
Nothing here imports torch where another engine is chosen: that would take longer than most jobs.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.core.config import GPTConfig
from mygpt.engine import only_in_torch
from mygpt.errors import InputError, require_choice
from mygpt.machine import DTYPES, QUANTIZED

if TYPE_CHECKING:
    from mygpt.core.model import GPT
    from mygpt.cpu.decode.speculation import Drafts
    from mygpt.decode.numpy_network import Network
    from mygpt.engine import Batch, Engine

EngineName = Literal["numpy", "cpu", "torch"]
ENGINES = ("auto", "numpy", "cpu", "torch")

# With fewer parameters, launching operations on a GPU costs more than its arithmetic saves.
_WORTH_A_GPU = 30_000_000  # parameters
# Compiling the kernels takes about 15 seconds; a job that NumPy does in less does not wait for it.
_WORTH_COMPILING_S = 5.0
# Tokens of a job for which it is worth to read a table of n-grams, which takes some milliseconds.
_WORTH_DRAFTS = 100
_LONG_JOB = 10**9  # tokens: more than a server writes
_NUMPY_STEP_S, _NUMPY_PRODUCTS_PER_S = 3e-4, 5e9  # per new token; per token read


@dataclass(frozen=True)
class Choice:
    """An engine and the reason for it, as the end of a sentence."""

    name: EngineName
    reason: str


def choose_engine(
    config: GPTConfig,
    *,
    tokens: int,
    reads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    wanted: str = "auto",
) -> Choice:
    """The engine for generating `tokens` tokens in all.

    Args:
        config: the model's shape.
        tokens: new tokens, of all samples together.
        reads: tokens that the model has to read (see `tokens_to_read`); None is `tokens`.
        device: "auto", or torch's name of a device.
        dtype: one of `DTYPES`; "auto" excludes no engine.
        wanted: one of `ENGINES`.

    Raises:
        InputError: for unknown names, or an engine without the device or number format.
    """
    require_choice("engine", wanted, ENGINES)
    require_choice("dtype", dtype, DTYPES)
    option = only_in_torch(config)
    if option is not None and wanted == "auto" and dtype not in QUANTIZED:
        return Choice("torch", f"only torch implements {option}")
    if option is not None and wanted != "torch":
        raise InputError(
            f"only torch implements {option}: use --engine torch, and a dtype that torch has"
        )
    if wanted != "auto":
        return _check(wanted, device, dtype)
    if dtype in QUANTIZED:
        return _check("cpu", device, dtype)
    if dtype not in ("auto", "float32"):
        return Choice("torch", f"only torch has {dtype}")
    if device not in ("auto", "cpu"):
        return Choice("torch", f"only torch runs on device {device}")
    if device == "auto" and may_have_gpu() and config.num_parameters() >= _WORTH_A_GPU:
        return Choice("torch", "there may be a GPU, and the model is large enough for it")
    return _choose_on_cpu(config, tokens, tokens if reads is None else reads)


def tokens_to_read(prompt: int, new: int, window: int, overflow: str) -> int:
    """How many tokens a model reads to generate `new` tokens after `prompt`.

    Past the window, "crop" reads the whole window for each token.
    """
    inside = max(0, min(new, window - prompt))
    past = (new - inside) * (window if overflow == "crop" else 1)
    return min(prompt, window) + inside + past


def _choose_on_cpu(config: GPTConfig, tokens: int, reads: int) -> Choice:
    if not cpu_engine_available():
        return Choice("numpy", "Numba is missing, or this system has no POSIX threads")
    from mygpt.cpu.common.build import has_machine_code

    if has_machine_code():
        return Choice("cpu", "its machine code is compiled")
    products_s = reads * config.num_parameters() / _NUMPY_PRODUCTS_PER_S
    if tokens * _NUMPY_STEP_S + products_s < _WORTH_COMPILING_S:
        return Choice("numpy", "the job is shorter than compiling (`mygpt warmup` does that ahead)")
    return Choice("cpu", "the job is long enough to compile for")


def _check(wanted: str, device: str, dtype: str) -> Choice:
    """The requested engine, or an error with what it does not support."""
    if wanted == "torch":
        if dtype in QUANTIZED:
            raise InputError(
                f"dtype={dtype} works only with the cpu engine: use --engine cpu, or float32"
            )
        return Choice("torch", "it was requested")
    if device not in ("auto", "cpu"):
        raise InputError(f"engine={wanted} runs on the CPU: use --engine torch for {device}")
    known = ("float32",) if wanted == "numpy" else ("float32", *QUANTIZED)
    if dtype not in ("auto", *known):
        fit = " or ".join(known)
        other = "cpu" if dtype in QUANTIZED else "torch"
        raise InputError(f"engine={wanted} has no dtype {dtype}: use {fit}, or --engine {other}")
    if wanted == "numpy":
        return Choice("numpy", "it was requested")
    if not cpu_engine_available():
        raise InputError(
            "engine=cpu needs Numba and a 64-bit POSIX system (on Windows: WSL): install numba, or "
            "use --engine numpy"
        )
    return Choice("cpu", f"it alone has {dtype}" if dtype in QUANTIZED else "it was requested")


@functools.cache
def cpu_engine_available() -> bool:
    """Whether this system has what the cpu engine needs."""
    from importlib.util import find_spec

    needs = all(find_spec(name) is not None for name in ("numba", "llvmlite"))
    return needs and os.name == "posix" and sys.maxsize > 2**32


def may_have_gpu() -> bool:
    """Whether the system seems to have a GPU that torch could use."""
    nvidia = os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia/version")
    return nvidia or (sys.platform == "darwin" and platform.machine() == "arm64")


class Backend:
    """A model and the engines that can run it.

    Args:
        model: a torch model, which may be changed at any time, or a checkpoint, whose arrays
            serve the NumPy and the `cpu` engine without torch.
        device: for a checkpoint: "auto", or torch's name of a device.
        dtype: for a checkpoint: one of `mygpt.machine.DTYPES`.
        engine: "auto", "numpy", "cpu" or "torch".
        compile: for torch (see `TorchEngine`).
        make_drafts: makes the drafts of the `cpu` engine, when they are first of use; None decodes
            without.

    Raises:
        InputError: for an engine, a device or a number format that is not available.
    """

    def __init__(
        self,
        model: GPT | Checkpoint,
        *,
        device: str,
        dtype: str,
        engine: str,
        compile: bool,
        make_drafts: Callable[[], Drafts] | None = None,
    ) -> None:
        self._make_drafts = make_drafts
        self._given = model
        self._model = None if isinstance(model, Checkpoint) else model
        self._device, self._dtype, self._wanted, self._compile = device, dtype, engine, compile
        self._engines: dict[str, Engine] = {}  # of a checkpoint
        choice = self.choose(1)
        if compile and choice.name != "torch":
            raise InputError(
                f"compile is for the torch engine, and {choice.name} is chosen "
                f"({choice.reason}): add --engine torch, or remove --compile"
            )
        if choice.name == "torch":
            _ = self.model  # raises for a device that is not available

    @property
    def model(self) -> GPT:
        """The torch model; a checkpoint's is built, in eval mode, at the first access.

        The caller may change it, so that from then on all engines run this model.
        """
        if self._model is None:
            self._model = self._built
        return self._model

    @property
    def source(self) -> GPT | Checkpoint:
        """What the engines run: the torch model, if there is one, else the checkpoint."""
        return self._given if self._model is None else self._model

    @property
    def read_only_model(self) -> GPT:
        """The torch model, which the caller does not change: the choice of engines stays."""
        return self._built if self._model is None else self._model

    @functools.cached_property
    def _built(self) -> GPT:
        """The checkpoint as a torch model, in eval mode."""
        from mygpt.machine import choose_device, choose_dtype

        assert isinstance(self._given, Checkpoint)
        device = choose_device(self._device)
        dtype = choose_dtype("float32" if self._dtype in QUANTIZED else self._dtype, device)
        return self._given.build_model().to(device, dtype).eval()

    def choose(self, tokens: int, reads: int | None = None) -> Choice:
        """The engine for so many tokens, and why; see `choose_engine`."""
        device, dtype = self._device, self._dtype
        if self._model is not None and self._wanted != "torch":
            from mygpt.decode.packing import packable_parameters

            if packable_parameters(self._model) is None:
                what = (
                    "has changed parts or options that only torch implements, or is not float32 "
                    "on the CPU"
                )
                if self._wanted == "auto":
                    return Choice("torch", f"the model {what}")
                raise InputError(
                    f"engine={self._wanted} cannot run this model, which {what}: use engine torch"
                )
            device, dtype = "cpu", dtype if dtype in QUANTIZED else "float32"
        elif self._model is not None:
            return Choice("torch", "it was requested")
        return choose_engine(
            self._given.config,
            tokens=tokens,
            reads=reads,
            device=device,
            dtype=dtype,
            wanted=self._wanted,
        )

    def engine(self, tokens: int, reads: int) -> Engine:
        """The engine for such a job, created when it is first needed."""
        name = self.choose(tokens, reads).name
        engine = self._engine(name)
        if name != "cpu":
            return engine
        from mygpt.cpu.decode.engine import CpuEngine

        assert isinstance(engine, CpuEngine)
        return engine.with_drafts(self._drafts if tokens >= _WORTH_DRAFTS else None)

    @functools.cached_property
    def _drafts(self) -> Drafts | None:
        return None if self._make_drafts is None else self._make_drafts()

    def open(self, size: int) -> Batch:
        """A batch of `size` slots, of the engine for long jobs."""
        return self.engine(_LONG_JOB, _LONG_JOB).open(size)

    def network(self) -> Network:
        """The model in NumPy; of a torch model with its present weights.

        Raises:
            InputError: for a model that NumPy does not implement.
        """
        from mygpt.decode.numpy_engine import NumpyEngine

        if option := only_in_torch(self._given.config):
            raise InputError(f"attention is computed by NumPy, and only torch implements {option}")
        engine = self._engine("numpy")
        assert isinstance(engine, NumpyEngine)
        return engine.network

    def _engine(self, name: EngineName) -> Engine:
        if name == "torch":
            return self._torch_engine
        if self._model is not None:
            from mygpt.decode.packing import arrays_of, cpu_engine_of

            if name == "cpu" and self._dtype not in QUANTIZED:
                return cpu_engine_of(self._model)
            arrays: Mapping[str, Any] = arrays_of(self._model)
        elif name in self._engines:
            return self._engines[name]
        else:
            assert isinstance(self._given, Checkpoint)
            self._given.check_shapes()
            arrays = self._given.arrays
        engine: Engine
        if name == "cpu":
            from mygpt.cpu.decode.engine import CpuEngine

            weights = self._dtype if self._dtype in QUANTIZED else "float32"
            engine = CpuEngine(self._given.config, arrays, weights=weights)
        else:
            from mygpt.decode.numpy_engine import NumpyEngine

            engine = NumpyEngine(self._given.config, arrays)
        if self._model is None:
            self._engines[name] = engine
        return engine

    @functools.cached_property
    def _torch_engine(self) -> Engine:
        """Kept for its compiled step; each call runs the model with its present weights."""
        from mygpt.decode.torch_engine import TorchEngine

        return TorchEngine(self.model, compile=self._compile)
