"""What a user can mend: the one kind of error that a command tells without a traceback."""


class UserError(Exception):
    """Something that a user can cause and mend; the message says what to do. Each part of the package has its own kind."""

    exit_code = 2
