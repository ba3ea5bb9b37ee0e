"""Run training on CPU ranks as it runs on GPUs."""

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def as_on_gpus() -> None:
    """From here on, accelerate takes gloo ranks for GPUs; their device stays the CPU.

    It refuses tensor parallelism on what it calls MULTI_CPU, for no reason that gloo would give. And memory is not
    pinned when FSDP2 offloads, since there is no GPU to copy it to.
    """
    set_device = PartialState.set_device

    def set_device_and_type(state: PartialState) -> None:
        set_device(state)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = set_device_and_type
    CPUOffloadPolicy.__init__.__defaults__ = (False,)
