// Baileys as the bridge has it installed, and what is taken from it: the fake has no dependency of its
// own, and speaks the protocol with the very encoders that its clients use.
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

const HOME = join(dirname(fileURLToPath(import.meta.url)), '../../../daemon/bridge/node')

if (!existsSync(join(HOME, 'node_modules', 'baileys'))) {
	process.stderr.write('Baileys is not installed: run make setup-whatsapp\n')
	process.exit(1)
}
const require = createRequire(join(HOME, 'package.json'))
const at = (name, ...path) => pathToFileURL(join(dirname(require.resolve(name)), ...path)).href

export const wa = await import(at('baileys', 'index.js'))
export const libsignal = require('libsignal')
export const { WebSocketServer } = await import(at('ws', 'wrapper.mjs'))
const tokens = await import(at('baileys', 'WABinary', 'constants.js'))

/** Decode a node at once: Baileys' own decoder is asynchronous, for the sake of compressed ones. */
export function decodeNode(bytes) {
	if (bytes[0] !== 0) throw new Error('a compressed or malformed node: no client sends these')
	return wa.decodeDecompressedBinaryNode(bytes.subarray(1), tokens)
}
