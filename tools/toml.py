"""tomllib, which Python has from 3.11 on. For 3.10: tomli, which it was, as a package or as pip's own copy of it."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ModuleNotFoundError:  # set-up reads pyproject.toml before there is a package
        from pip._vendor import tomli as tomllib

__all__ = ["tomllib"]
