"""The error every user mistake ends in: one clear line that names the file, line or value."""


def one_line(error):
    """The message of an error in one line, or its class where it has none."""
    return ' '.join(str(error).split()) or type(error).__name__


class UserError(ValueError):
    """Something the user gave is wrong or missing. Scripts print its one line and exit with code 2."""
