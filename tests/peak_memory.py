"""The most that a part of a training step holds at once."""

import torch
from torch.distributed._tools.mem_tracker import MemTracker


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
