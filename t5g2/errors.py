"""The one exception that the command line turns into a one-line message and exit code 2."""


class UserError(Exception):
    """A mistake the user can mend: the message is one line that names the thing and the fix."""
