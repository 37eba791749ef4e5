// llama.cpp's own settings, changed for a device: everything in one file, because the pinned llama-server gives nothing
// but "/" to a browser that has no key yet; and a version that is not the time of the build.
import upstream from './upstream.svelte.config.js';

export default {
	...upstream,
	kit: {
		...upstream.kit,
		files: { appTemplate: 'edgeft.app.html' },
		output: { bundleStrategy: 'inline' },
		version: { name: process.env.EDGEFT_WEB_VERSION, pollInterval: 0 }
	}
};
