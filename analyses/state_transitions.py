"""Which state of routing follows which.

    python analyses/state_transitions.py RUN [--json] [--rows N]

`leaving` is the chance to go there when `before` ends, `expected_leaving` what the shares make it; `token_log2_ratio` is the
effect if routing followed the tokens alone.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("state_transitions"))
