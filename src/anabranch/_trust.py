"""Whether code in a cache may be loaded: only where nobody but this user can have written it.

A cache has a root, which the user chose (``~/.cache``, say). Looked at are the file, the folder that holds it, and each
folder from there up to the root. Root may own folders and links: root can do anything anyway. What is above the root is
the administrator's.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def objection(path: Path, root: Path) -> str | None:
    """Why the file ``path``, somewhere below ``root``, must not be loaded, and what to do about it; None where it may.

    It may where it is a regular file (no link) of this user that nobody else can write to, and
    :func:`folder_objection` has none. Raises OSError where it is not there or cannot be looked at.
    """
    # First the folders: once they are known to be safe, nobody can exchange the file that is looked at next.
    why = folder_objection(path.parent, root)
    if why:
        return why
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        what = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is no file"
        return f"{_described(path, status)} {what}, and a file is expected: put a copy of the file there"
    if status.st_uid != os.getuid():
        return _foreign(path, status)
    if status.st_mode & _OTHERS_WRITE:
        return _writable(path, status)
    return None


def folder_objection(folder: Path, root: Path) -> str | None:
    """Why files in ``folder`` must not be loaded, and what to do about it; None where they may.

    They may where this user or root owns it and each folder above it, up to ``root``, and nobody else can write there.
    Above ``folder``, two kinds of folders may be writable: sticky ones, as ``/tmp``, where nobody can move what belongs
    to another; and those of the user's private group, which a umask of 002 makes.
    """
    for each in _chain(folder, root):
        status = each.lstat()
        if stat.S_ISLNK(status.st_mode):
            if status.st_uid not in (os.getuid(), 0):
                return _foreign(each, status)
            status = each.stat()
        if status.st_uid not in (os.getuid(), 0):
            return _foreign(each, status)
        writers = status.st_mode & _OTHERS_WRITE
        if each != folder:
            if status.st_mode & stat.S_ISVTX:
                writers = 0
            elif _is_private(status.st_gid):
                writers &= ~stat.S_IWGRP
        if writers:
            return _writable(each, status)
    return None


def make_folders(folder: Path, root: Path) -> None:
    """Make ``folder``, and what is missing above it, for this user alone, whatever the umask is."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for each in _chain(folder, root):
        each.mkdir(mode=0o700, exist_ok=True)


def close_folders(folder: Path, root: Path) -> bool:
    """Take from others the right to write to the user's own folders below ``root``; the root is for the user to change.

    Returns whether ``folder`` was open: then somebody else may have moved the files in it.
    """
    opened = False
    for each in _chain(folder, root)[1:]:
        status = each.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & _OTHERS_WRITE:
            each.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
            opened = opened or each == folder
    return opened


def _chain(folder: Path, root: Path) -> list[Path]:
    """From ``root`` down to ``folder``."""
    names = folder.relative_to(root).parts
    return [root.joinpath(*names[:n]) for n in range(len(names) + 1)]


def _is_private(group: int) -> bool:
    """Whether the group is the user's own, named like the user and without other members (as pam_umask has it)."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    named_alike = user.pw_gid == group and found.gr_name == user.pw_name
    return user.pw_uid != 0 and named_alike and not set(found.gr_mem) - {user.pw_name}


def _foreign(path: Path, status: os.stat_result) -> str:
    me = _name(os.getuid())
    return (
        f"{_described(path, status)} does not belong to {me}, who runs this process: if you trust what is there, "
        f"chown -h {me} {path}"
    )


def _writable(path: Path, status: os.stat_result) -> str:
    return f"{_described(path, status)} can be written to by others than its owner: chmod go-w {path}"


def _described(path: Path, status: os.stat_result) -> str:
    return f"{path} (owner {_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o})"


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
