"""Zip archives, those inside archives too, into their folder and nowhere else."""

from __future__ import annotations

import zipfile
from pathlib import Path

from deploy.downloads.manifest import DownloadError


def unpack(archive: Path) -> None:
    """Unpack beside the archive and remove it; archives that it holds are unpacked where they lie (BIRD's databases).

    Raises:
        DownloadError: it is damaged, or names files outside its folder.
    """
    folder = archive.parent
    try:
        with zipfile.ZipFile(archive) as files:
            names = files.namelist()
            for name in names:
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise DownloadError(f"{archive} names a file outside its folder ({name}): do not use it")
            files.extractall(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"{archive} is damaged ({error}): remove it and download again") from None
    archive.unlink()
    for name in names:
        if name.endswith(".zip") and not name.startswith("__MACOSX"):
            unpack(folder / name)
