"""The error and the warning of reading GGUF files."""


class GgufError(ValueError):
    """A GGUF file, or a request made of one, is wrong.

    The message names the file, the tensor or key, what came, what was wanted and the fix where there is one.
    Failures of the operating system (missing file, no permission) stay ``OSError``; only what is not a regular
    file at all (a pipe, a socket, a device) is a ``GgufError``.
    """


class DenseFallbackWarning(UserWarning):
    """A tensor's type has no packed path: it was dequantised to dense float32 and costs more memory.

    The message names the tensor, its type and the bytes. Filter it like any warning, by this class.
    """
