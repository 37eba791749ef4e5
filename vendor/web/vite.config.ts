// llama.cpp's own settings, changed for a device: no service worker, which would answer with yesterday's page after an
// update; no cards of servers in the internet; nothing beside the page; and a list of what is in it, for the licences.
import { SVELTEKIT_PWA_OPTIONS } from './src/lib/constants/pwa.constants';
import upstream from './vite.config';
import { writeFileSync } from 'node:fs';
import { relative } from 'node:path';
import { type ConfigEnv, defineConfig, type Plugin, type UserConfig } from 'vite';

SVELTEKIT_PWA_OPTIONS.disable = true;

function offline(): Plugin {
	return {
		enforce: 'pre',
		load(id) {
			if (!id.endsWith('/recommended-mcp-servers.constants.ts')) return null;
			return 'export const RECOMMENDED_MCP_SERVERS = [];';
		},
		name: 'edgeft:offline'
	};
}

// Every file that was read for the page in the browser, style sheets too: those are only watched.
function contents(): Plugin {
	let server = false;
	return {
		apply: 'build',
		configResolved(config) {
			server = Boolean(config.build.ssr);
		},
		generateBundle() {
			if (server) return;
			const files = [...this.getModuleIds(), ...this.getWatchFiles()]
				.map((id) => id.replace(/^\0+/, '').replace(/\?.*$/, ''))
				.filter((id) => id.startsWith(process.cwd()))
				.map((id) => relative(process.cwd(), id));
			writeFileSync('contents.json', JSON.stringify([...new Set(files)].sort()));
		},
		name: 'edgeft:contents'
	};
}

export default defineConfig(async (env: ConfigEnv): Promise<UserConfig> => {
	const config = (await (upstream as (env: ConfigEnv) => UserConfig)(env)) as UserConfig;
	return {
		...config,
		build: { ...config.build, assetsInlineLimit: 100_000_000, sourcemap: false },
		plugins: [...(config.plugins ?? []), offline(), contents()]
	};
});
