"""Adapt the outside world (stores, WhatsApp, HTTP, settings, logs) to the ports of `machine`."""

__version__ = "0.1.0"
