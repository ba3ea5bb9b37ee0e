"""Pipeline parallelism: a rank's part of the model, and the schedule of torch.distributed.pipelining that runs it.

A rank holds one chunk of consecutive layers, or several (interleaved schedules). All other modules are empty there, so
that parameters keep the names of the whole model.

Ranks are numbered (data-parallel rank x pp_size + stage) x tp_size + tensor-parallel rank. The stages and tensor-
parallel ranks of one data-parallel rank read the same rows: each builds masks, positions and routing noise itself, and
only hidden states go from stage to stage. Trainer and accelerate take all of them for tensor-parallel ranks, which
share a batch.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.quantizers.auto import get_hf_quantizer

from ..compat_grinmoe import require_layouts
from ..configuration_grinmoe import GrinMoeConfig
from ..linear_experts_grinmoe import check_quantized, disable_bnb_cpu_repacking, exclude_router_from_quantization
from ..loading_grinmoe import check_parallel_sizes
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..packed_grinmoe import pack_layers
from ..planning.schedules import SCHEDULES, Schedule
from .sharded import load_weights

# Entries of batches that the loss alone reads, in Trainer and in trl.
LOSS_INPUTS = {
    "labels", "shift_labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps",
    "label", "KL_input_ids", "KL_attention_mask", "KL_completion_mask", "ref_logps", "ref_KL_logps",
}  # fmt: skip


DEFAULT_SCHEDULE = "1F1B"

LossFunction = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class Step(NamedTuple):
    """What a chunk computes with in one step."""

    micro_batches: Iterator[dict[str, Any]]
    """Still to come; every schedule runs a chunk's forward passes in their order."""
    shape: torch.Size
    """Between chunks, `[rows, tokens, H]`; smaller micro-batches are filled up to it."""
    loss_function: LossFunction
    autocast: Callable[[], AbstractContextManager]


class Chunk(nn.Module):
    """Consecutive layers of a model, after the embedding in the first chunk, and before norm and head in the last.

    The modules are the model's own. A `GrinMoeModel` of the chunk's own runs them, with its own balance window, so
    that the forward passes of an optimizer step count once for each layer.
    """

    def __init__(self, model: GrinMoeForCausalLM, layers: range):
        super().__init__()
        whole = model.model
        self.is_first = layers.start == 0
        self.is_last = layers.stop == len(whole.layers)
        self.decoder = copy.copy(whole)
        self.decoder.first_layer = layers.start
        self.decoder._modules = {
            "embed_tokens": whole.embed_tokens if self.is_first else nn.Identity(),
            "layers": nn.ModuleList(whole.layers[index] for index in layers),
            "norm": whole.norm if self.is_last else nn.Identity(),
            "rotary_emb": whole.rotary_emb,
        }
        self.lm_head = model.lm_head if self.is_last else nn.Identity()
        self.step: Step | None = None

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Run the next micro-batch, from the last chunk's output to the next one's input, or to the loss, a scalar."""
        assert self.step is not None
        micro_batch = next(self.step.micro_batches)
        inputs = {key: value for key, value in micro_batch.items() if key not in LOSS_INPUTS}
        ids = inputs.pop("input_ids")
        batch_size, length = ids.shape
        if hidden_states is None:
            inputs["input_ids"] = ids
        else:
            inputs.update(inputs_embeds=hidden_states[:batch_size, :length], token_ids=ids)
        with self.step.autocast():
            output = self.decoder(**inputs, use_cache=False).last_hidden_state
            if self.is_last:
                return self.step.loss_function(output, micro_batch)
        rows, tokens, _ = self.step.shape
        return nn.functional.pad(output, (0, 0, 0, tokens - length, 0, rows - batch_size))


class LowMemoryStage(PipelineStage):
    """torch's stage with receive buffers that live only until the micro-batch's backward pass.

    torch keeps a buffer for every micro-batch of a step in both directions, 17 GB for 128 of the released model's.
    """

    def _setup_forward_recv_info(self, *args, **kwargs):
        with self.without_memory():
            super()._setup_forward_recv_info(*args, **kwargs)

    def _setup_backward_recv_info(self, *args, **kwargs):
        with self.without_memory():
            super()._setup_backward_recv_info(*args, **kwargs)

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _get_recv_ops(self, recv_infos):
        for info in recv_infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def backward_one_chunk(self, bwd_chunk_id, *args, **kwargs):
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info.get(bwd_chunk_id, ())):
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta")


class Pipeline:
    """One rank's part of a pipeline: its chunks, and the schedules that run them."""

    def __init__(self, model: GrinMoeForCausalLM, chunks: dict[int, Chunk], mesh: DeviceMesh, schedule: Schedule):
        """
        Args:
            model: the rank's model, whose parts the chunks are.
            chunks: this rank's chunks, by their number in the pipeline.
            mesh: has the axes `dp`, `pp` and `tp`.
        """
        self.model = model
        self.chunks = chunks
        self.mesh = mesh
        self.schedule = schedule
        self.device = next(model.parameters()).device
        self.pp_size, self.tp_size = mesh["pp"].size(), mesh["tp"].size()
        self._prepared: tuple[Any, Any] = (None, None)  # a schedule, and the arguments it was made for

    def begin_step(self, step: int | None, *, num_tokens: int | None = None, **settings: Any) -> None:
        """Call `GrinMoePreTrainedModel.begin_step` for every chunk; `num_tokens` counts all ranks, stages included."""
        if self.model.model.routing_observer is not None:
            raise ValueError("RoutingCallback needs every layer in one process: leave it out of a pipeline")
        if num_tokens is not None:
            num_tokens //= self.pp_size * self.tp_size
        for chunk in self.chunks.values():
            chunk.decoder.begin_step(step, num_tokens=num_tokens, group=self.mesh.get_group("dp"), **settings)

    def end_step(self) -> None:
        """Call `GrinMoePreTrainedModel.end_step` for every chunk."""
        for chunk in self.chunks.values():
            chunk.decoder.end_step()

    def run(
        self,
        micro_batches: list[dict[str, Any]],
        loss_function: LossFunction,
        autocast: Callable[[], AbstractContextManager],
        *,
        training: bool,
    ) -> torch.Tensor:
        """Run the micro-batches, backward as well if `training`; all ranks of the pipeline return the sum of losses.

        Args:
            micro_batches: model inputs and labels, on the device; sizes may differ.
            loss_function: takes the last hidden states and their micro-batch, and returns a scalar.
            autocast: the context of each forward pass.
        """
        sizes = torch.tensor([batch["input_ids"].shape for batch in micro_batches])
        shape = torch.Size((*sizes.amax(dim=0).tolist(), self.model.config.hidden_size))
        schedule = self._prepare(len(micro_batches), shape, training)
        for chunk in self.chunks.values():
            chunk.train(training)
            chunk.step = Step(iter(micro_batches), shape, loss_function, autocast)
        losses: list[torch.Tensor] = []
        no_target = torch.zeros(len(micro_batches))  # the schedule hands each micro-batch its part of one
        (schedule.step if training else schedule.eval)(target=no_target, losses=losses, return_outputs=False)
        if training:
            for parameter in self.adapters():
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, group=self.mesh.get_group("dp"))
        loss = torch.zeros((), device=self.device)
        if losses:
            loss += torch.stack(losses).detach().sum()
        dist.broadcast(loss, group=self.mesh.get_group("pp"), group_src=self.pp_size - 1)
        return loss

    def _prepare(self, num_micro_batches: int, shape: torch.Size, training: bool) -> Any:
        """Make the schedule for `num_micro_batches` of a shape, or return the last one if it fits."""
        made_for = num_micro_batches, shape, training
        if self._prepared[1] == made_for:
            return self._prepared[0]
        # Without given shapes the first step would try out the modules, which count their forward passes.
        hidden_states = torch.empty(shape, dtype=self.model.dtype, device="meta", requires_grad=True)
        num_chunks, group = self.pp_size * len(self.chunks), self.mesh.get_group("pp")
        stages = [
            LowMemoryStage(chunk, number, num_chunks, self.device, () if chunk.is_first else hidden_states,
                           hidden_states, group=group)
            for number, chunk in self.chunks.items()
        ]  # fmt: skip
        fits = self.schedule.admits(num_micro_batches, self.pp_size)
        schedule_class = get_schedule_class(self.schedule.name if fits else self.schedule.fallback)
        given: Any = stages if issubclass(schedule_class, PipelineScheduleMulti) else stages[0]
        schedule = schedule_class(given, num_micro_batches, loss_fn=lambda loss, target: loss, scale_grads=False)
        self._prepared = schedule, made_for
        return schedule

    def adapters(self) -> list[nn.Parameter]:
        """Parameters that data-parallel ranks have whole, and FSDP does not know of: adapters."""
        if self.mesh["dp"].size() == 1:
            return []
        learnt = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        return [parameter for parameter in learnt if not isinstance(parameter.data, DTensor)]

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """The small `state` of all stages."""
        of_stages: list[Any] = [None] * self.pp_size
        dist.all_gather_object(of_stages, state, group=self.mesh.get_group("pp"))
        return {name: value for stage in of_stages for name, value in stage.items()}

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients to a norm over the whole model; return the norm before."""
        by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
        for parameter in self.model.parameters():
            if (grad := parameter.grad) is not None:
                by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
        square = torch.zeros((), device=self.device)
        for grads in by_mesh.values():
            norm = get_total_norm(grads)
            square += (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
        dist.all_reduce(square, group=self.mesh.get_group("pp"))
        total_norm = square.sqrt()
        clip_grads_with_norm_(self.model.parameters(), max_norm, total_norm, foreach=False)
        return total_norm


def keep_layers(model: GrinMoeForCausalLM, kept: Iterable[int]) -> None:
    """Put empty modules in the place of all layers except `kept`, of the embedding unless the first layer is kept, and
    of norm and head unless the last is."""
    num_layers, kept = model.config.num_hidden_layers, set(kept)
    dropped = [f"model.layers.{index}" for index in range(num_layers) if index not in kept]
    dropped += [] if 0 in kept else ["model.embed_tokens"]
    dropped += [] if num_layers - 1 in kept else ["model.norm", "lm_head"]
    for name in dropped:
        model.set_submodule(name, nn.Identity())


def refuse_whole_forward(module: nn.Module, args: Any) -> None:
    raise ValueError("this rank has a part of the model only: train and evaluate it with GrinMoe(SFT)Trainer")


def check_pipeline(
    config: GrinMoeConfig, pp_size: int, tp_size: int = 1, schedule: str = DEFAULT_SCHEDULE
) -> tuple[int, int]:
    """Return the numbers of chunks and data-parallel ranks of a pipeline; arguments and errors as `pipeline_model`."""
    require_layouts()
    if schedule not in SCHEDULES:
        raise ValueError(f"pipeline_schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings=True: the first stage and the last cannot share a parameter")
    num_chunks = pp_size * SCHEDULES[schedule].chunks_per_rank
    check_parallel_sizes(config, tp_size=tp_size, pp_size=max(1, num_chunks))
    num_processes = PartialState().num_processes
    if pp_size < 2 or num_processes % (pp_size * tp_size):
        raise ValueError(
            f"the number of processes must be a multiple of pp_size={pp_size} x tp_size={tp_size}, with at least two "
            f"stages; got {num_processes}"
        )
    return num_chunks, num_processes // (pp_size * tp_size)


def pipeline_model(
    folder: str | Path,
    config: GrinMoeConfig | None = None,
    *,
    pp_size: int,
    tp_size: int = 1,
    schedule: str = DEFAULT_SCHEDULE,
    **settings: Any,
) -> GrinMoeForCausalLM:
    """Load this rank's part of a model for pipeline-parallel training from a checkpoint in the released layout.

    Data parallelism, with FSDP2, takes the ranks that pp_size x tp_size leave. All ranks must call it.

    Args:
        folder: the checkpoint's folder; each rank reads its own part.
        config: the model's configuration, by default the checkpoint's.
        schedule: a name in `SCHEDULES`.
        settings: `dtype`, `attn_implementation`, `experts_implementation` and `quantization_config`, as in
            `from_pretrained`.

    Raises:
        ValueError: sizes that do not fit the model or the number of ranks, an unknown schedule, tied embeddings.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder here: download the checkpoint")
    config = GrinMoeConfig.from_pretrained(folder) if config is None else copy.deepcopy(config)
    quantization = exclude_router_from_quantization(settings.pop("quantization_config", None))
    quantizer, config, _ = get_hf_quantizer(config, quantization, None, True, {})
    num_chunks, dp_size = check_pipeline(config, pp_size, tp_size, schedule)
    kind, state = SCHEDULES[schedule], PartialState()
    mesh = init_device_mesh(state.device.type, (dp_size, pp_size, tp_size), mesh_dim_names=("dp", "pp", "tp"))

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **settings)
        if quantizer is not None:
            quantizer.preprocess_model(model, device_map=None)
            pack_layers(model)
    tp_plan = model._resolve_parallel_plans(DistributedConfig(tp_size=tp_size))[0]
    layers = torch.arange(config.num_hidden_layers).tensor_split(num_chunks)
    numbers = range(mesh["pp"].get_local_rank(), num_chunks, pp_size)
    keep_layers(model, torch.cat([layers[number] for number in numbers]).tolist())
    if tp_size > 1:
        kept = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
        kept |= {name for name, _ in model.named_parameters()}
        apply_tensor_parallelism(model, mesh["tp"], {name: tp_plan[name] for name in tp_plan if name in kept})
    chunks = {n: Chunk(model, range(int(layers[n][0]), int(layers[n][-1]) + 1)) for n in numbers}
    rotary_emb = type(model.model.rotary_emb)(config).to(state.device)  # its buffers are in no checkpoint
    for chunk in chunks.values():
        if dp_size > 1:
            # Gathered once a step: the schedule computes with a chunk again and again.
            for layer in chunk.decoder.layers:
                fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=False)
            fully_shard(chunk, mesh=mesh["dp"], reshard_after_forward=False)
        chunk.to_empty(device=state.device)
        chunk.decoder.rotary_emb = rotary_emb
    load_weights(model, folder)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        check_quantized(model)
        disable_bnb_cpu_repacking(model)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)

    # Trainer reads these: it neither wraps nor moves the model, and gives the ranks of a pipeline the same rows.
    model._is_distributed_loading_by_transformers = True
    model._tp_size = pp_size * tp_size
    model.config.distributed_config = DistributedConfig(tp_size=pp_size * tp_size, fsdp_size=dp_size)
    pipeline = Pipeline(model, chunks, mesh, kind)
    object.__setattr__(model, "pipeline", pipeline)  # not as a module: the model has its parameters already
    object.__setattr__(model, "begin_step", pipeline.begin_step)
    object.__setattr__(model, "end_step", pipeline.end_step)
    model.register_forward_pre_hook(refuse_whole_forward)
    return model
