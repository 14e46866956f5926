"""The files of a folder or of a glob, each once however many links lead to it, and what cannot be listed."""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# So many files and folders are looked at between two questions whether to stop.
CHECK_ENTRIES = 100
# The pattern of everything below a folder.
ALL = ("**", "*")
HIDDEN, TWICE, NO_FILE = "hidden", "there under another name, too", "neither file nor folder"


@dataclass(kw_only=True)
class Files:
    """What was found below a folder; all names are relative to it."""

    root: Path
    """The folder."""
    files: list[str] = field(default_factory=list)
    """Each file once, sorted."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why, to the names of what is there and is not among the files."""
    unlisted: list[str] = field(default_factory=list)
    """What the system does not let us look at, with its reason."""
    outside: list[str] = field(default_factory=list)
    """Links that were followed out of the folder, with where they lead."""


def find_files(path: str, check: Callable[[], None] = lambda: None) -> Files:
    """All files below a folder, or those that a glob names, in which ** is any folders; hidden ones must be named.

    Links are followed, but a file or folder that is reached twice counts once, under its name without links.
    `check` is called again and again, to raise when it is time to stop.
    """
    if os.path.isdir(path):
        return _Walk(Path(path), check).find(ALL)
    parts = Path(path).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    pattern = parts[fixed:]
    return _Walk(Path(*parts[:fixed]), check).find((*pattern, "*") if pattern[-1] == "**" else pattern)


class _Walk:
    """Breadth first; what is reached through a link waits until all else is known."""

    def __init__(self, root: Path, check: Callable[[], None]) -> None:
        self._check, self._num_entries = check, 0
        self._found = Files(root=root)
        self._tree = os.path.realpath(root)
        self._todo: deque[tuple[str, tuple[str, ...]]] = deque()
        self._links: deque[tuple[str, tuple[str, ...]]] = deque()
        self._folders: set[tuple[int, int, tuple[str, ...]]] = set()
        self._files: set[tuple[int, int]] = set()

    def find(self, pattern: tuple[str, ...]) -> Files:
        if self._found.root.is_dir():
            self._todo.append(("", pattern))
        while self._todo or self._links:
            is_link = not self._todo
            self._visit(*(self._links if is_link else self._todo).popleft(), is_link)
        self._found.files.sort()
        return self._found

    def _visit(self, name: str, pattern: tuple[str, ...], is_link: bool) -> None:
        """A folder whose content matches the pattern, or with an empty pattern a file."""
        path = self._found.root / name
        try:
            stat = path.stat()
            if not pattern:
                self._take(name, (stat.st_dev, stat.st_ino))
                return
            if (key := (stat.st_dev, stat.st_ino, pattern)) in self._folders:
                self._leave_out(TWICE, name)
                return
            self._folders.add(key)
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._found.unlisted.append(f"{path} ({error.strerror})")
            return
        for entry in found:
            self._num_entries += 1
            if self._num_entries % CHECK_ENTRIES == 0:
                self._check()
            self._look_at(entry, os.path.join(name, entry.name), pattern, is_link)

    def _look_at(self, entry: os.DirEntry[str], name: str, pattern: tuple[str, ...], is_link: bool) -> None:
        patterns = [pattern, pattern[1:]] if pattern[0] == "**" else [pattern]
        matching = [one for one in patterns if _matches(entry.name, one[0])]
        if not matching:
            if pattern == ALL:
                self._leave_out(HIDDEN, name)
            return
        try:
            entry.stat()
            is_folder, is_file, links = entry.is_dir(), entry.is_file(), entry.is_symlink()
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError) and entry.is_symlink()
            why = f"a link to nothing: {os.readlink(entry.path)}" if dangling else error.strerror
            self._found.unlisted.append(f"{self._found.root / name} ({why})")
            return
        following = self._links if links or is_link else self._todo
        if is_folder:
            deeper = [one if one[0] == "**" else one[1:] for one in matching if one[0] == "**" or len(one) > 1]
            if not deeper:
                self._leave_out("a folder (** reads what is in it)", name)
        else:
            deeper = [()] if any(len(one) == 1 for one in matching) else []
            if deeper and not is_file:
                self._leave_out(NO_FILE, name)
                return
        if deeper and links and not f"{os.path.realpath(entry.path)}/".startswith(f"{self._tree.rstrip('/')}/"):
            self._found.outside.append(f"{name} -> {os.readlink(entry.path)}")
        following.extend((name, one) for one in deeper)

    def _take(self, name: str, key: tuple[int, int]) -> None:
        if key in self._files:
            if name not in self._found.files:
                self._leave_out(TWICE, name)
            return
        self._files.add(key)
        self._found.files.append(name)

    def _leave_out(self, why: str, name: str) -> None:
        self._found.left_out.setdefault(why, []).append(name)


def _matches(name: str, pattern: str) -> bool:
    if name.startswith(".") and not pattern.startswith("."):
        return False
    return pattern == "**" or fnmatch.fnmatchcase(name, pattern)
