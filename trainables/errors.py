"""The root of the errors that a user can mend."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that says where, what was given, what is allowed and how to mend it. The commands
    print it without a traceback and exit with code 2.
    """
