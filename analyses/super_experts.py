"""Whether a few experts write outputs far larger than all others.

    python analyses/super_experts.py RUN [--json] [--rows N]

Needs a run captured with --keep contribution. The published rule (`passes`) nearly always names someone;
`stands_apart` asks more.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("super_experts"))
