"""Why the router chose the experts it chose: affinity, the bias, or the group limit.

    python analyses/choice_reasons.py RUN [--json] [--rows N]

Needs a run captured with `--keep logits`. Tokens whose stored logits give another choice than the recorded one are left out,
and `left_out` says how many.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("choice_reasons"))
