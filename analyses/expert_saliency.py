"""How much each expert adds when it is chosen, and how few experts add most of what a layer adds.

    python analyses/expert_saliency.py RUN [--json] [--rows N]

Needs a run captured with --keep contribution. `saliency` is the mean norm of weight times output; `experts_50` says how
many experts add half of what their layer adds.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_saliency"))
