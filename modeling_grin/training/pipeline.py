"""Pipeline parallelism: torch.distributed.pipelining under Trainer's own loop.

The micro-batches of Trainer's accumulation window are the pipeline's: the schedule runs forward and backward passes of
all of them when Trainer hands over the last. Optimizer, clipping, learning rate, logs and callbacks stay Trainer's.
A rank holds one chunk of consecutive layers, or several (interleaved schedules); whatever else the model has is empty
there, so that names of parameters are those of the whole model.

Ranks are numbered (data-parallel rank x pp_size + stage) x tp_size + tensor-parallel rank. The stages and tensor-
parallel ranks of one data-parallel rank read the same rows: each builds masks, positions and routing noise itself, and
hidden states are all that goes from stage to stage. For Trainer and accelerate they are what these call
tensor-parallel ranks, which share a batch.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import recursively_apply
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from ..compat_grinmoe import require_layouts
from ..configuration_grinmoe import GrinMoeConfig
from ..loading_grinmoe import check_parallel_sizes
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..planning.schedules import SCHEDULES, Schedule
from .sharded import load_weights

# What batches hold for the loss alone, in Trainer and in trl.
LOSS_INPUTS = {
    "labels", "shift_labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps",
    "label", "KL_input_ids", "KL_attention_mask", "KL_completion_mask", "ref_logps", "ref_KL_logps",
}  # fmt: skip

if TYPE_CHECKING:  # checked as a part of what it is mixed into
    from transformers import Trainer as _Base
else:
    _Base = object


DEFAULT_SCHEDULE = "1F1B"

LossFunction = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class Chunk(nn.Module):
    """Consecutive layers of a model; the first chunk has the embedding, too, and the last one norm and head.

    The modules are the model's own. The decoder that runs them is a `GrinMoeModel` by itself, with its own balance
    window: the forward passes of an optimizer step must be counted once for each layer.
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
        self.micro_batches: Iterator[dict[str, Any]] = iter(())
        """Still to come in this step. Every schedule runs a chunk's forward passes in their order."""
        self.shape = torch.Size()
        """Of what chunks hand on, `[rows, tokens, H]`: micro-batches that are smaller are filled up on the way."""
        self.loss_function: LossFunction | None = None
        self.autocast: Callable[[], AbstractContextManager] = nullcontext

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """The next micro-batch through the layers: from what the chunk before hands on, `shape`, to what the next one
        gets, `shape`, or to the loss, a scalar."""
        micro_batch = next(self.micro_batches)
        inputs = {key: value for key, value in micro_batch.items() if key not in LOSS_INPUTS}
        ids = inputs.pop("input_ids")
        batch_size, length = ids.shape
        if hidden_states is None:
            inputs["input_ids"] = ids
        else:
            inputs.update(inputs_embeds=hidden_states[:batch_size, :length], token_ids=ids)
        with self.autocast():
            output = self.decoder(**inputs, use_cache=False).last_hidden_state
            if self.is_last:
                logits = self.lm_head(output)
        if self.is_last:
            assert self.loss_function is not None
            return self.loss_function(logits, micro_batch)
        rows, tokens, _ = self.shape
        return nn.functional.pad(output, (0, 0, 0, tokens - length, 0, rows - batch_size))


class Stage(PipelineStage):
    """torch's stage, but for the memory of what it receives: a micro-batch has it from then to its backward pass.

    torch holds a buffer for every micro-batch of a step in both directions, 17 GB for 128 of the released model's.
    """

    def _setup_forward_recv_info(self, *args, **kwargs):
        with self._without_memory():
            super()._setup_forward_recv_info(*args, **kwargs)

    def _setup_backward_recv_info(self, *args, **kwargs):
        with self._without_memory():
            super()._setup_backward_recv_info(*args, **kwargs)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
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
            model: the rank's model, which the chunks are parts of.
            chunks: this rank's, by their number in the pipeline.
            mesh: with the axes `dp`, `pp` and `tp`.
        """
        self.model = model
        self.chunks = chunks
        self.mesh = mesh
        self.schedule = schedule
        self.device = next(model.parameters()).device
        self.pp_size, self.tp_size = mesh["pp"].size(), mesh["tp"].size()
        self._prepared: tuple[Any, Any] = (None, None)  # a schedule, and what it was made for

    def begin_step(self, step: int | None, *, num_tokens: int | None = None, **settings: Any) -> None:
        """`GrinMoePreTrainedModel.begin_step` for every chunk; `num_tokens` is over all ranks, stages included."""
        if self.model.model.routing_observer is not None:
            raise ValueError("RoutingCallback needs every layer in one process: leave it out of a pipeline")
        if num_tokens is not None:
            num_tokens //= self.pp_size * self.tp_size
        for chunk in self.chunks.values():
            chunk.decoder.begin_step(step, num_tokens=num_tokens, group=self.mesh.get_group("dp"), **settings)

    def run(
        self,
        micro_batches: list[dict[str, Any]],
        loss_function: LossFunction,
        autocast: Callable[[], AbstractContextManager],
        *,
        training: bool,
    ) -> torch.Tensor:
        """The sum of the micro-batches' losses, on all ranks of the pipeline; in training, with a backward pass.

        Args:
            micro_batches: model inputs and labels, on the device; sizes may differ.
            loss_function: from logits and the micro-batch that they are of, to a scalar.
            autocast: for each forward pass.
        """
        sizes = torch.tensor([batch["input_ids"].shape for batch in micro_batches])
        shape = torch.Size((*sizes.amax(dim=0).tolist(), self.model.config.hidden_size))
        schedule = self._prepare(len(micro_batches), shape, training)
        for chunk in self.chunks.values():
            chunk.train(training)
            chunk.micro_batches, chunk.shape = iter(micro_batches), shape
            chunk.loss_function, chunk.autocast = loss_function, autocast
        losses: list[torch.Tensor] = []
        no_target = torch.zeros(len(micro_batches))  # but the schedule hands each micro-batch its part of one
        (schedule.step if training else schedule.eval)(target=no_target, losses=losses, return_outputs=False)
        loss = torch.zeros((), device=self.device)
        if losses:
            loss += torch.stack(losses).detach().sum()
        dist.broadcast(loss, group=self.mesh.get_group("pp"), group_src=self.pp_size - 1)
        return loss

    def _prepare(self, num_micro_batches: int, shape: torch.Size, training: bool) -> Any:
        """The schedule for so many micro-batches of a shape; the last one is kept."""
        made_for = num_micro_batches, shape, training
        if self._prepared[1] == made_for:
            return self._prepared[0]
        # Shapes are stated, or else the first step would try the modules out, which count what they do.
        hidden_states = torch.empty(shape, dtype=self.model.dtype, device="meta", requires_grad=True)
        stages = [
            Stage(
                chunk,
                number,
                self.pp_size * len(self.chunks),
                self.device,
                input_args=() if chunk.is_first else hidden_states,
                output_args=hidden_states,
                group=self.mesh.get_group("pp"),
            )
            for number, chunk in self.chunks.items()
        ]
        fits = self.schedule.admits(num_micro_batches, self.pp_size)
        schedule_class = get_schedule_class(self.schedule.name if fits else self.schedule.fallback)
        schedule = schedule_class(
            stages if issubclass(schedule_class, PipelineScheduleMulti) else stages[0],
            num_micro_batches,
            loss_fn=lambda loss, target: loss,
            scale_grads=False,
        )
        self._prepared = schedule, made_for
        return schedule

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients to a norm over the whole model, which is returned."""
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


def refuse_whole_forward(module: nn.Module, args: Any) -> None:
    raise ValueError("this rank has a part of the model only: train and evaluate with GrinMoeTrainer or its SFT kin")


def keep_layers(model: GrinMoeForCausalLM, kept: Iterable[int]) -> None:
    """Leave modules without parameters in the place of all layers but `kept`, and of the embedding or the norm and
    head where the first or last layer is not kept."""
    num_layers, kept = model.config.num_hidden_layers, set(kept)
    dropped = [f"model.layers.{index}" for index in range(num_layers) if index not in kept]
    if 0 not in kept:
        dropped.append("model.embed_tokens")
    if num_layers - 1 not in kept:
        dropped += ["model.norm", "lm_head"]
    for name in dropped:
        model.set_submodule(name, nn.Identity())


def check_pipeline(
    config: GrinMoeConfig,
    pp_size: int,
    tp_size: int = 1,
    schedule: str = DEFAULT_SCHEDULE,
    chunks_per_rank: int | None = None,
) -> tuple[int, int]:
    """The number of chunks of a pipeline, and of its data-parallel ranks; arguments and errors as `pipeline_model`."""
    require_layouts()
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    kind = SCHEDULES[schedule]
    if chunks_per_rank is None:
        chunks_per_rank = kind.chunks_per_rank
    if chunks_per_rank < 1 or (chunks_per_rank > 1 and kind.chunks_per_rank == 1):
        raise ValueError(
            f"chunks_per_rank={chunks_per_rank} is not for schedule={schedule!r}: 1, or more with Interleaved1F1B"
        )
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings=True: the first stage and the last cannot share a parameter")
    check_parallel_sizes(config, tp_size=tp_size, pp_size=max(1, pp_size) * chunks_per_rank)
    num_processes = PartialState().num_processes
    if pp_size < 2 or num_processes % (pp_size * tp_size):
        raise ValueError(
            f"{num_processes} processes are not data-parallel ranks of pp_size={pp_size} x tp_size={tp_size}: "
            "launch a multiple of that many, with at least two stages"
        )
    return pp_size * chunks_per_rank, num_processes // (pp_size * tp_size)


def pipeline_model(
    folder: str | Path,
    config: GrinMoeConfig | None = None,
    *,
    pp_size: int,
    tp_size: int = 1,
    schedule: str = DEFAULT_SCHEDULE,
    chunks_per_rank: int | None = None,
    **settings: Any,
) -> GrinMoeForCausalLM:
    """This rank's part of a model for pipeline-parallel training, loaded from a checkpoint in the released layout.

    Data parallelism, with FSDP2, takes the ranks that pp_size x tp_size leave. All ranks call it.

    Args:
        folder: the checkpoint's; each rank reads its own part.
        config: the model's, by default the checkpoint's.
        schedule: of `SCHEDULES`.
        chunks_per_rank: in how many places of the pipeline a rank is; one, or two with an interleaved schedule.
        settings: `dtype`, `attn_implementation` and `experts_implementation`, as in `from_pretrained`.

    Raises:
        ValueError: sizes that do not fit the model or the number of ranks, an unknown schedule, tied embeddings.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder here: download the checkpoint, of which each rank reads its part")
    config = GrinMoeConfig.from_pretrained(folder) if config is None else copy.deepcopy(config)
    num_chunks, dp_size = check_pipeline(config, pp_size, tp_size, schedule, chunks_per_rank)
    kind, state = SCHEDULES[schedule], PartialState()
    mesh = init_device_mesh(state.device.type, (dp_size, pp_size, tp_size), mesh_dim_names=("dp", "pp", "tp"))

    with torch.device("meta"):
        model = GrinMoeForCausalLM._from_config(config, **settings)
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
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)

    # What Trainer reads: it neither wraps nor moves the model, and gives the ranks of a pipeline the same rows.
    model._is_distributed_loading_by_transformers = True
    model._tp_size = pp_size * tp_size
    model.config.distributed_config = DistributedConfig(tp_size=pp_size * tp_size, fsdp_size=dp_size)
    pipeline = Pipeline(model, chunks, mesh, kind)
    object.__setattr__(model, "pipeline", pipeline)  # no module of the model: its parameters are there already
    object.__setattr__(model, "begin_step", pipeline.begin_step)
    model.register_forward_pre_hook(refuse_whole_forward)
    return model


class PipelineTrainerMixin(_Base):
    """Trainer's hooks for a model of `pipeline_model`; nothing for any other."""

    def __init__(self, *args, **kwargs):
        self._micro_batches: list[dict[str, Any]] = []  # of the step, so far
        super().__init__(*args, **kwargs)
        if self._pipeline is not None:
            self._check_pipeline()

    @property
    def _pipeline(self) -> Pipeline | None:
        return getattr(self.model, "pipeline", None)

    def _check_pipeline(self) -> None:
        """Raise ValueError for what a pipeline cannot do."""
        assert self._pipeline is not None
        args, schedule, pp_size = self.args, self._pipeline.schedule, self._pipeline.pp_size
        refused = {
            "LoRA (a PeftModel)": isinstance(self.model, PeftModel),
            "exact_balance=True": getattr(self, "exact_balance", False),
            "average_tokens_across_devices=False": not args.average_tokens_across_devices,
            "fp16=True": args.fp16,
            "torch_compile=True": args.torch_compile,
            "label_smoothing_factor": args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "compute_metrics": self.compute_metrics is not None,
            "loss_type other than 'nll'": getattr(args, "loss_type", "nll") != "nll",
            "activation_offloading=True": getattr(args, "activation_offloading", False),
        }
        if names := [name for name, is_set in refused.items() if is_set]:
            raise ValueError(f"a pipeline cannot do {', '.join(names)}: change it, or train without a pipeline")
        if not schedule.admits(args.gradient_accumulation_steps, pp_size):
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} is the number of micro-batches, and "
                f"{schedule.name} on {pp_size} stages cannot do so many: {pp_size} or a multiple of it will do"
            )

    def _pipeline_loss(self, num_items_in_batch: torch.Tensor) -> LossFunction:
        """Trainer's (and trl's) loss of a causal language model, from the number of the step's labels."""
        assert self._pipeline is not None
        model, dp_size = self._pipeline.model, self._pipeline.mesh["dp"].size()
        num_items = num_items_in_batch.clamp(min=1)  # as in trl, where a step may have no labels

        def loss_function(logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
            loss = model.loss_function(
                logits,
                inputs["labels"],
                model.config.vocab_size,
                num_items_in_batch=num_items,
                shift_labels=inputs.get("shift_labels"),
            )
            return loss * dp_size  # gradients are averaged

        return loss_function

    def get_batch_samples(self, *args, **kwargs):
        self._micro_batches = []  # else those of a step that ran out of memory would be in the next one
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        pipeline = self._pipeline
        if pipeline is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(self._prepare_inputs(inputs))
        if len(self._micro_batches) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        model.train()
        loss_function = self._pipeline_loss(num_items_in_batch)
        return pipeline.run(micro_batches, loss_function, self.accelerator.autocast, training=True)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        pipeline = self._pipeline
        if pipeline is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if "labels" not in inputs:
            raise ValueError("a pipeline evaluates losses and keeps no logits: give rows with labels")
        inputs = self._prepare_inputs(inputs)
        loss_function = self._pipeline_loss(self._get_num_items_in_batch([inputs], self.args.device))
        with torch.no_grad():
            loss = pipeline.run([inputs], loss_function, self.accelerator.autocast, training=False)
        return loss, None, None

    def evaluation_loop(self, *args, **kwargs):
        if self.get_tp_size() > 1:
            self.gather_function = self._gather_rows  # Trainer takes accelerate's again for the next evaluation
        return super().evaluation_loop(*args, **kwargs)

    def _gather_rows(self, tensor: Any) -> Any:
        """accelerate's `gather_for_metrics`, of values by row; that takes a row for several where ranks share it, and
        counts the last batch of an evaluation for less than it is."""
        state = self.accelerator.gradient_state

        def gather(rows: torch.Tensor) -> torch.Tensor:
            gathered = self.accelerator.gather(rows[None])[:: self.get_tp_size()].flatten(0, 1)
            return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

        return recursively_apply(gather, tensor)

    def _clip_grad_norm(self, model):
        if self._pipeline is None:
            return super()._clip_grad_norm(model)
        return self._pipeline.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if self._pipeline is None:
            return super()._get_grad_norm(model, grad_norm)
        return self._pipeline.clip_grad_norm(float("inf")) if grad_norm is None else grad_norm

    def _sync_replicated_trainable_parameters(self, model):
        if self._pipeline is None:  # else nothing is replicated over all ranks
            super()._sync_replicated_trainable_parameters(model)
