// The bridge's Node process; docs/bridge.md is its contract with the daemon.
//
// The console is taken away before anything else is loaded: libsignal prints whole session records,
// private keys included, and static imports run before the first line of the file that has them.
// So this file imports nothing else statically.
import './console.mjs'

const { serve } = await import('./bridge.mjs')
serve()
