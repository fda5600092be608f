from contextlib import AbstractContextManager

class Logger:
    severity: int
    def suppress(self, severity: int = ...) -> AbstractContextManager[object]: ...

G_LOGGER: Logger
