"""Which experts directly raise the logit of the token that follows, and which lower it.

    python analyses/logit_attribution.py RUN [--json] [--rows N]

Needs a run captured with --keep lens. The direct path alone: what later layers make of a contribution is not in it.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("logit_attribution"))
