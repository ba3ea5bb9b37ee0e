"""The most that a part of a training step holds at once."""

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from modeling_grin.planning.setting import Training


class PeakMemory(MemTracker):
    """torch's tracker, without its records by module: these fail where parameters are replaced for a call (experts
    under autocast) and where a module runs several times (pipelines).

    What is there already has to be told it, with `track_external`: gradients, too, which it then adds to.
    """

    def _ignore(self, *args) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore

    def peak(self) -> dict[str, int]:
        """Bytes at the worst moment: `PARAM`, `GRAD`, `OPT`, `BUFFER`, `Total`, and `ACT` for the rest."""
        kinds = self.get_tracker_snapshot("peak")[torch.device("cpu")]
        named = {getattr(kind, "name", kind): size for kind, size in kinds.items()}
        stays = {kind: named[kind] for kind in ("PARAM", "GRAD", "OPT", "BUFFER")}
        return {**stays, "ACT": named["Total"] - sum(stays.values()), "Total": named["Total"]}


def peak_of_a_step(model: nn.Module, training: Training) -> dict[str, int]:
    """Bytes at the worst moment of a step's last micro-batch, and of the optimizer, when all state is there."""
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(5, model.config.vocab_size, (training.micro_batch, training.sequence))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "mixed"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    step()
    memory = PeakMemory()
    memory.track_external(model, optimizer)
    with memory:
        step()
    return memory.peak()
