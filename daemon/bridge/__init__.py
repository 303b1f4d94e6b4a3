"""The real WhatsApp, through Node processes that host Baileys. docs/bridge.md is their protocol.

Lives here: those processes and what is said to them, behind `machine.ports.Connector`.
Never lives here: a decision about the lease, an account's fate or what is stored.
"""
