"""What each state of routing goes with: labels of steps, families, tokens, experts.

    python analyses/state_profiles.py RUN [--json] [--rows N]

`part` of the state's tokens against `overall`; `beyond_log2_ratio` tests labels against what words, problem and third make.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("state_profiles"))
