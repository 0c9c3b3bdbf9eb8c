// Draws the dashboard's rows to PNG with Grafana's own UI components in headless Chromium.
//
//   python -m monitoring.ui.collect --prometheus http://127.0.0.1:9090 --out data.json
//   npm install && node draw.mjs data.json ../../docs
//
// CHROMIUM names the browser (default: /usr/bin/chromium).
import { build } from "esbuild";
import { chromium } from "playwright-core";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const [data, out] = process.argv.slice(2);
if (!out) throw new Error("usage: node draw.mjs DATA.json FOLDER");
const folder = mkdtempSync(join(tmpdir(), "panels-"));
try {
  await build({ entryPoints: [join(here, "panels.tsx")], bundle: true, outfile: join(folder, "panels.js"), jsx: "automatic", format: "iife", logLevel: "error",
    define: { "process.env.NODE_ENV": '"production"', global: "window" }, loader: { ".svg": "dataurl", ".woff2": "dataurl", ".png": "dataurl", ".ttf": "dataurl" } });
  const html = `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="panels.css"><body style="margin:0;width:1240px"><div id="root"></div>
    <script>window.DATA = ${readFileSync(data, "utf8")};</script><script src="panels.js"></script></body>`;
  writeFileSync(join(folder, "index.html"), html);
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"] });
  const page = await browser.newPage({ viewport: { width: 1240, height: 900 } });
  page.on("pageerror", (error) => console.error(String(error.stack).slice(0, 700)));
  await page.goto(`file://${join(folder, "index.html")}`);
  await page.waitForSelector(".drawn");
  await page.waitForTimeout(4000);
  for (const row of await page.$$(".drawn")) {
    const name = (await row.getAttribute("data-row")).toLowerCase().replace(/[^a-z ]/g, "").replaceAll(" ", "-");
    const path = resolve(out, `dashboard-${name}.png`);
    await row.screenshot({ path });
    console.log(path);
  }
  await browser.close();
} finally {
  rmSync(folder, { recursive: true });
}
