"""The error of a user, which the command line shows as one sentence with exit code 2."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk


class UserError(ValueError):
    """Something that the user can mend. The sentence says what was wrong, where, and what to do.

    Every other exception is a bug or a fault of the machine, and keeps its traceback.
    """
