"""Which experts a family of problems leans on, and how few serve it.

    python analyses/expert_affinity.py RUN [--json] [--rows N]

`set` marks the smallest sets that hold a tenth, a fifth and half of the family's weight in their layer.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_affinity"))
