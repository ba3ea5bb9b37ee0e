"""Routing metrics in the training log. L layers, E experts, K top-k, S steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..analysis.routing import RoutingSums, routing_sums
from ..files import replacing


def drop_lines_after(step: int, path: Path) -> None:
    """Remove the steps after `step`, which will be taken again, and a torn line from `layers.jsonl`."""
    if not path.exists():
        return
    with replacing(path) as rest, path.open(encoding="utf-8") as lines, rest.open("w", encoding="utf-8") as file:
        file.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)


class RoutingCallback(TrainerCallback):
    """Adds routing metrics to the log of Trainer and TRL's trainers; every `report_to` gets them.

    Each training log gets these scalars, counted over all steps since the log before, with all their micro-batches and
    ranks, without padding; means over the layers unless stated:

    - `routing/load_max`: choices of the busiest expert, relative to a fair share: 1 balanced, at most E / K;
    - `routing/load_max_worst`: the same in the layer where it is largest;
    - `routing/max_vio`: `load_max` - 1, the MaxVio of loss-free balancing (arXiv 2408.15664): 0 balanced;
    - `routing/load_entropy`: entropy of the experts' shares of the choices, relative to log E: 1 balanced;
    - `routing/dead_experts`: experts that no token chose, in all layers together;
    - `routing/router_entropy`: entropy of softmax(z), mean over tokens, relative to log E: 1 undecided;
    - `routing/near_tie_rate`: share of tokens with a second expert in the keep set of their first choice;
    - `routing/non_argmax_rate`: share of choices that fell on another expert than the best one left;
    - `routing/balance_loss`: the load-balance loss of an optimizer step, mean over the steps: 1 balanced;
    - `routing/balance_loss_worst`: the same in the layer where it is largest;
    - `routing/balance_to_task`: length of the gradient of the routers' weights by the balance loss (and z-loss) over
      its length by the task, all layers together, in the step that is logged: far above 1, the router learns little
      else than balance. What reaches a router from later layers' balance losses counts as the task. Without a balance
      loss, and in compiled models, it is not measured.

    `output_dir/routing/layers.jsonl` has a line for each log with the values by layer and the load `[L, E]`, each row
    the experts' shares of a layer's choices. A resumed run drops the lines of later steps, and appends. A model card
    draws the load; so does `modeling_grin.analysis.figures.draw_expert_load`.

        trainer.add_callback(RoutingCallback(trainer))
    """

    _lengths: torch.Tensor | None
    """Of the routers' gradients by the task and by the balance loss in the latest step that was measured, `[L, 2]`."""

    def __init__(self, trainer: Trainer, layers: Sequence[int] = ()):
        """
        Args:
            trainer: the trainer that logs; this callback must come before those that report.
            layers: layers whose values are scalars in the log as well: `routing/layer_3/load_max` and so on.
        """
        self._handler = trainer.callback_handler
        self.layers = list(layers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Start to observe `model`.

        Raises:
            ValueError: the model is not a GRIN-MoE or has no such layer, or nothing is ever logged.
        """
        decoder = model.get_decoder()  # of a PEFT model as well
        if not hasattr(decoder, "routing_observer"):
            raise ValueError(f"RoutingCallback needs a GRIN-MoE model; {type(decoder).__name__} cannot be observed")
        if args.logging_strategy == "no":
            raise ValueError("RoutingCallback adds to the training log, and logging_strategy='no' turns that off")
        config = decoder.config
        if unknown := [layer for layer in self.layers if not 0 <= layer < config.num_hidden_layers]:
            last = config.num_hidden_layers - 1
            raise ValueError(f"RoutingCallback: layers {unknown} are not among the model's layers 0 to {last}")
        # Callbacks are called in order, and a user's come after those that report the log.
        self._handler.callbacks = [self, *(callback for callback in self._handler.callbacks if callback is not self)]
        self._decoder = decoder
        self._sums = torch.zeros(config.num_hidden_layers, 2 * config.num_local_experts + 4, device=model.device)
        self._measures_gradients = config.router_aux_loss_coef > 0 and not args.torch_compile
        self._steps: list[torch.Tensor] = []  # of each step since the last log, `[L, 2E + 4]`
        self._lengths = None
        self._folder = Path(args.output_dir) / "routing"
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            drop_lines_after(state.global_step, self._folder / "layers.jsonl")
        decoder.routing_observer = self._observe  # replaces the observer of a training that raised

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self._sums.zero_()
        is_logged = (state.global_step + 1) % state.logging_steps == 0 or args.logging_strategy == "epoch"
        if self._measures_gradients and is_logged:
            layers = self._decoder.layers
            shape = len(layers), 2, *layers[0].block_sparse_moe.gate.weight.shape
            self._decoder.router_gradients = torch.zeros(shape, device=self._sums.device)

    def _observe(
        self,
        router_logits: tuple[torch.Tensor, ...],
        selected_experts: tuple[torch.Tensor, ...],
        counted: torch.Tensor,
    ) -> None:
        sums = routing_sums(router_logits, selected_experts, counted, self._decoder.config.router_jitter_noise)
        self._sums += sums.to(self._sums.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        gradients, self._decoder.router_gradients = self._decoder.router_gradients, None
        if gradients is not None:
            self._lengths = reduce(gradients, "sum").flatten(2).norm(dim=-1).cpu().double()  # [L, 2]
        self._steps.append(self._sums.clone())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" not in logs or not self._steps:
            return  # evaluation, the summary at the end, or a trainer's extra lines
        steps = reduce(torch.stack(self._steps), "sum").cpu().double()  # [S, L, 2E + 4], over all ranks
        self._steps = []
        lengths, self._lengths = self._lengths, None
        load, metrics = summarize(steps, lengths)
        scalars = {f"routing/{name}": values.mean().item() for name, values in metrics.items()}
        scalars["routing/dead_experts"] = metrics["dead_experts"].sum().item()
        for name in ("load_max", "balance_loss"):
            scalars[f"routing/{name}_worst"] = metrics[name].max().item()
        if lengths is not None:
            scalars["routing/balance_to_task"] = (lengths[:, 1].norm() / lengths[:, 0].norm()).item()
        for layer in self.layers:
            scalars.update({f"routing/layer_{layer}/{name}": values[layer].item() for name, values in metrics.items()})
        logs.update(scalars)
        state.log_history[-1].update(scalars)  # it holds a copy of `logs`
        if not state.is_world_process_zero:
            return
        by_layer = {name: values.tolist() for name, values in {**metrics, "load": load}.items()}
        with (self._folder / "layers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **by_layer}) + "\n")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._decoder.routing_observer = self._decoder.router_gradients = None


def summarize(steps: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The load `[L, E]` (rows sum to 1) and the metrics by layer, each `[L]`, of the sums of steps, `[S, L, 2E + 4]`,
    and of `_lengths`."""
    sums = RoutingSums.from_columns(steps.sum(dim=0))
    if not sums.tokens.all():
        raise ValueError("RoutingCallback saw no token: the trainer's loss does not come from its model's decoder")
    metrics = {
        "load_max": sums.load_max(),
        "max_vio": sums.load_max() - 1,
        "load_entropy": sums.load_entropy(),
        "dead_experts": (sums.choices == 0).double().sum(dim=-1),
        "router_entropy": sums.router_entropy(),
        "near_tie_rate": sums.near_tie_rate(),
        "non_argmax_rate": sums.other_draws / sums.choices.sum(dim=-1),
        "balance_loss": RoutingSums.from_columns(steps).balance_loss().mean(dim=0),  # step by step, as it acts
    }
    if lengths is not None:
        metrics["balance_to_task"] = lengths[:, 1] / lengths[:, 0]
    return sums.load(), metrics
