"""Which experts owe their work to the bias, and whom it keeps out.

    python analyses/expert_reasons.py RUN [--json] [--rows N]

Needs a run captured with `--keep logits`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_reasons"))
