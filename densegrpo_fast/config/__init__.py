"""Every option of a run: its type, range and meaning, the presets, files and command line it comes from. No torch."""

from densegrpo_fast.config.schema import Config, options, sections

__all__ = ["Config", "options", "sections"]
