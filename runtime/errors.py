"""Every error tclkit raises on purpose.

    TclkitError
    ├── ConfigError          a configuration key or value is wrong
    ├── InputError           an argument, image or prompt cannot be used (also a ValueError)
    ├── TrainingError        training cannot go on
    │   └── TrainingStoppedError  a signal ended it after a step; the same command goes on
    ├── CheckpointError      a training checkpoint cannot be read or does not fit
    ├── ExportError          a graph could not be written
    ├── ParityError          a compiled artefact differs from its reference by more than allowed
    ├── BuildError           an engine could not be built
    ├── BundleError          a bundle is missing, incomplete or damaged
    ├── BackendError         a backend is not installed or cannot run this bundle
    ├── EngineMismatchError  an engine was built for another machine or TensorRT version
    └── DownloadError        a file could not be fetched, or is not the one expected

A message says what, where, expected against found, and the remedy. Values travel as attributes.
"""


class TclkitError(Exception):
    """Root of all tclkit errors; keyword arguments become attributes of the same name."""

    def __init__(self, message: str, **values: object) -> None:
        super().__init__(message)
        self.message = message
        self.values = values
        for name, value in values.items():
            setattr(self, name, value)


class ConfigError(TclkitError):
    """A configuration key or value is wrong."""


class InputError(TclkitError, ValueError):
    """An argument, image or prompt cannot be used."""


class TrainingError(TclkitError):
    """Training cannot go on."""


class TrainingStoppedError(TrainingError):
    """A signal ended training after a step, and a checkpoint was written; the same command goes on."""


class CheckpointError(TclkitError):
    """A training checkpoint cannot be read or does not fit the model."""


class ExportError(TclkitError):
    """A graph could not be written."""


class ParityError(TclkitError):
    """A compiled artefact differs from its reference by more than allowed."""


class BuildError(TclkitError):
    """An engine could not be built."""


class BundleError(TclkitError):
    """A bundle is missing, incomplete or damaged."""


class BackendError(TclkitError):
    """A backend is not installed or cannot run this bundle."""


class EngineMismatchError(TclkitError):
    """An engine was built for another machine or TensorRT version."""


class DownloadError(TclkitError):
    """A file could not be fetched, or is not the one expected."""
