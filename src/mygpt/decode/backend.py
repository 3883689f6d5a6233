"""The engines of one model: made from a checkpoint's arrays, or from a torch model as it is now."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.decode.choice import Choice, choose
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.core.model import GPT
    from mygpt.decode.numpy_network import Network
    from mygpt.engine import Batch, Engine

_LONG_JOB = 10**9  # tokens: more than a server writes


class Backend:
    """A model and the engines that can run it; `choose` selects one.

    Args:
        model: a torch model, which may be changed at any time, or a checkpoint, whose arrays
            serve the NumPy and the `cpu` engine without torch.
        device: for a checkpoint: "auto", or torch's name of a device.
        dtype: for a checkpoint: one of `mygpt.machine.DTYPES`.
        engine: "auto", "numpy", "cpu" or "torch".
        compile: for torch (see `TorchEngine`).

    Raises:
        InputError: for an engine, a device or a number format that is not available.
    """

    def __init__(
        self, model: GPT | Checkpoint, *, device: str, dtype: str, engine: str, compile: bool
    ) -> None:
        self._checkpoint = model if isinstance(model, Checkpoint) else None
        self._model = None if isinstance(model, Checkpoint) else model
        self._device, self._dtype, self._wanted, self._compile = device, dtype, engine, compile
        self._engines: dict[str, Engine] = {}
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
            from mygpt.machine import choose_device, choose_dtype

            assert self._checkpoint is not None
            device = choose_device(self._device)
            dtype = choose_dtype("float32" if self._dtype == "int8" else self._dtype, device)
            self._model = self._checkpoint.build_model().to(device, dtype).eval()
        return self._model

    def choose(self, tokens: int, reads: int | None = None) -> Choice:
        """The engine for so many tokens, and why; see `mygpt.decode.choice.choose`."""
        job: dict[str, Any] = {"tokens": tokens, "reads": reads, "wanted": self._wanted}
        if self._model is None:
            assert self._checkpoint is not None
            config, device, dtype = self._checkpoint.config, self._device, self._dtype
            return choose(config, device=device, dtype=dtype, **job)
        from mygpt.decode.packing import can_pack

        if self._wanted == "torch":
            return Choice("torch", "it was requested")
        if can_pack(self._model):
            dtype = "int8" if self._dtype == "int8" else "float32"
            config = self._model.config
            return choose(config, device="cpu", dtype=dtype, **job)
        if self._wanted != "auto":
            raise InputError(
                f"engine={self._wanted} cannot run this model, which has changed parts or is not "
                "float32 on the CPU: use engine torch"
            )
        return Choice("torch", "the model has changed parts, or is not float32 on the CPU")

    def engine(self, tokens: int, reads: int) -> Engine:
        """The engine for such a job, created when it is first needed."""
        name = self.choose(tokens, reads).name
        if name == "torch":
            return self._torch_engine
        if self._model is not None:
            return self._engine_of_model(self._model, name)
        if name not in self._engines:
            self._engines[name] = self._engine_of_checkpoint(name)
        return self._engines[name]

    def open(self, size: int) -> Batch:
        """A batch of `size` slots, of the engine for long jobs."""
        return self.engine(_LONG_JOB, _LONG_JOB).open(size)

    def network(self) -> Network:
        """The model in NumPy; of a torch model with its present weights."""
        from mygpt.decode.numpy_network import Network

        if self._model is not None:
            from mygpt.decode.packing import arrays_of

            return Network(self._model.config, arrays_of(self._model))
        return self._network

    @cached_property
    def _network(self) -> Network:
        from mygpt.decode.numpy_network import Network

        assert self._checkpoint is not None
        self._checkpoint.check_shapes()
        return Network(self._checkpoint.config, self._checkpoint.arrays)

    @cached_property
    def _torch_engine(self) -> Engine:
        """Kept for its compiled step; each call runs the model with its present weights."""
        from mygpt.decode.torch_engine import TorchEngine

        return TorchEngine(self.model, compile=self._compile)

    def _engine_of_checkpoint(self, name: str) -> Engine:
        checkpoint = self._checkpoint
        assert checkpoint is not None
        checkpoint.check_shapes()
        if name == "cpu":
            from mygpt.cpu.decode.engine import CpuEngine

            weights = "int8" if self._dtype == "int8" else "float32"
            return CpuEngine(checkpoint.config, checkpoint.arrays, weights=weights)
        from mygpt.decode.numpy_engine import NumpyEngine

        return NumpyEngine(checkpoint.config, checkpoint.arrays)

    def _engine_of_model(self, model: GPT, name: str) -> Engine:
        from mygpt.decode.packing import arrays_of, cpu_engine_of

        if name == "cpu" and self._dtype != "int8":
            return cpu_engine_of(model)
        if name == "cpu":
            from mygpt.cpu.decode.engine import CpuEngine

            return CpuEngine(model.config, arrays_of(model), weights="int8")
        from mygpt.decode.numpy_engine import NumpyEngine

        return NumpyEngine(model.config, arrays_of(model))
