"""The error of a wrong input: one sentence that names the field, the value and the remedy."""


class UserError(ValueError):
    """Raised for input that a user can correct; the command line prints it and exits with 2."""
