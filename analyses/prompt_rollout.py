"""Whether a model uses its experts otherwise in the completion than in the prompt.

    python analyses/prompt_rollout.py RUN [--json] [--rows N]

`raw_divergence` counts the words of either; `divergence` compares the same words of the same problem, in bits.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("prompt_rollout"))
