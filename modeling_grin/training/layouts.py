"""How a recipe spreads a model over ranks: what accelerate's config file says, done by transformers while it loads.

transformers' engine (`DistributedConfig`) does FSDP2 and tensor parallelism together, reads for each rank its own part
of a checkpoint and no more, and runs on CPUs, too; accelerate's loads whole models first and wraps them afterwards.
"""

import os

from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.utils import strtobool

from ..compat_grinmoe import require_layouts


def take_launched_layout(training: TrainingArguments, pipeline_parallel_size: int = 1) -> DistributedConfig | None:
    """FSDP2 and tensor parallelism as `accelerate launch` was told in its config file; None: neither.

    They are taken out of the environment, or accelerate would shard the model a second time. In bfloat16 training
    FSDP2 gathers bfloat16 copies of its float32 weights, as accelerate's would, and reduces gradients in float32.

    Args:
        pipeline_parallel_size: more than 1: the layout's tensor-parallel size is that of a stage, and its other sizes
            are left to the number of processes.

    Raises:
        ValueError: FSDP of version 1 or with its own activation checkpointing, context or sequence parallelism, what
            pipelines do not have, or sizes that are not those of the launch.
    """
    use_fsdp, use_sizes = (
        strtobool(os.environ.pop(name, "false"))
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
    )
    if not (use_fsdp or use_sizes):
        return None
    require_layouts()
    sizes = ParallelismConfig() if use_sizes else ParallelismConfig(dp_shard_size=training.world_size)
    if sizes.cp_size * sizes.sp_size > 1:
        raise ValueError("context and sequence parallelism are not supported: use parallelism_config_tp_size")
    if pipeline_parallel_size == 1 and sizes.total_size != training.world_size:
        raise ValueError(
            f"dp_replicate_size={sizes.dp_replicate_size} x dp_shard_size={sizes.dp_shard_size} x tp_size="
            f"{sizes.tp_size} of parallelism_config are not the {training.world_size} processes of the launch: set "
            "--num_processes or --parallelism_config_dp_shard_size"
        )
    offload = False
    if use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version={plugin.fsdp_version} in the launch's config file is not supported: use 2")
        if plugin.activation_checkpointing:
            raise ValueError("fsdp_activation_checkpointing is not read: set activation_checkpointing of the recipe")
        offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    if pipeline_parallel_size > 1 and (offload or sizes.dp_replicate_size > 1):
        raise ValueError(
            "a pipeline has neither fsdp_offload_params nor dp_replicate_size: use accelerate/pipeline.yaml"
        )
    return DistributedConfig(
        fsdp_size=sizes.dp_shard_size,
        dp_replicate_size=sizes.dp_replicate_size,
        tp_size=sizes.tp_size,
        fsdp_cpu_offload=offload,
        fsdp_mixed_precision=training.mixed_precision == "bf16",
    )
