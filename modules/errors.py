"""The error every user mistake ends in: one clear line that names the file, line or value."""


class UserError(ValueError):
    """Something the user gave is wrong or missing. Scripts print its one line and exit with code 2."""
