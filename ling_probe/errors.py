"""Every exception that ling_probe raises on purpose.

    LingProbeError
    ├── ConfigError          a model configuration that is not a Ling 2.0 we can run
    ├── CheckpointError      a checkpoint that is missing, truncated or does not fit its configuration
    ├── RoutingMismatch      a loaded model does not route as the Ling 2.0 rule says
    ├── BenchmarkError       a benchmark or one of its records cannot be read
    ├── RunError             a run folder that exists, is missing, damaged, foreign or too new
    ├── InterventionError    a change to routing that this model cannot carry out
    └── UsageError           an argument that makes no sense for what it is applied to

Messages say what was found, what was expected and what to do. The command line prints them on one line and exits with 2;
anything else that reaches it is a bug and shows its traceback.
"""


class LingProbeError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(LingProbeError):
    """A model configuration that is not a Ling 2.0 we can run."""


class CheckpointError(LingProbeError):
    """A checkpoint that is missing, truncated or does not fit its configuration."""


class RoutingMismatch(LingProbeError):
    """A loaded model does not route as the Ling 2.0 rule says."""


class BenchmarkError(LingProbeError):
    """A benchmark, or one of its records, cannot be read."""


class RunError(LingProbeError):
    """A run folder that exists already, is missing, damaged, foreign or too new."""


class InterventionError(LingProbeError):
    """A change to routing that this model cannot carry out."""


class UsageError(LingProbeError):
    """An argument that makes no sense for what it is applied to."""
