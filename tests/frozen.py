"""Imported last of what processes are forked with: collections of garbage then pass over all of it.

accelerate collects at the start of every training, which took a third of the time of runs of tiny models.
"""

import gc

gc.collect()
gc.freeze()
