"""What a training takes, reckoned from its shape: parameters, operations, bytes, steps and time.

Formulas alone, each with its source: nothing is run here, and no torch is imported.
`mygpt.training.efficiency` measures what they leave open.
"""

from mygpt.scaling.compute import Flops, flops_per_token
from mygpt.scaling.job import Estimate, Job, Time, estimate
from mygpt.scaling.memory import DeviceMemory, States, device_memory, smallest_devices, states
from mygpt.scaling.published import PUBLISHED, Published

__all__ = [
    "PUBLISHED",
    "DeviceMemory",
    "Flops",
    "Job",
    "Published",
    "Estimate",
    "States",
    "Time",
    "device_memory",
    "flops_per_token",
    "estimate",
    "smallest_devices",
    "states",
]
