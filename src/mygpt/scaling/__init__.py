"""Cost estimate of a training run from its shape: parameters, operations, bytes, steps and time.

Only formulas, each with its source: nothing is run here, and torch is not imported.
`mygpt.training.efficiency` measures what formulas cannot give: the operations per second.
"""

from mygpt.scaling.compute import Flops, palm_flops_per_token
from mygpt.scaling.job import Estimate, Job, Time, estimate
from mygpt.scaling.memory import DeviceMemory, States, device_memory, smallest_devices, states
from mygpt.scaling.published import PUBLISHED, Published

__all__ = [
    "PUBLISHED",
    "Estimate",
    "DeviceMemory",
    "Flops",
    "Job",
    "Published",
    "States",
    "Time",
    "device_memory",
    "estimate",
    "palm_flops_per_token",
    "smallest_devices",
    "states",
]
