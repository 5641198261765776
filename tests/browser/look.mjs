// node look.mjs PAGE SCREENSHOT [WIDTH] [window]: open a file in Chromium, without a network, and print what its reader
// sees as JSON. The screenshot shows the whole page or the window.
import { pathToFileURL } from "node:url";

process.env.AWS_LAMBDA_JS_RUNTIME ??= "nodejs24.x"; // the package then brings the libraries that a bare system lacks
const { default: packaged } = await import("@sparticuz/chromium");
const { chromium } = await import("playwright-core");

const [page, screenshot, width] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: await packaged.executablePath(), args: packaged.args });
const context = await browser.newContext({ offline: true, viewport: { width: Number(width ?? 1280), height: 900 } });
const tab = await context.newPage();
const seen = { requests: [], failed: [], messages: [] };
tab.on("request", (request) => request.url().startsWith("data:") || seen.requests.push(request.url()));
tab.on("requestfailed", (request) => seen.failed.push(request.url().slice(0, 100)));
tab.on("console", (message) => seen.messages.push(message.text()));
tab.on("pageerror", (error) => seen.messages.push(String(error)));
await tab.goto(pathToFileURL(page).href, { waitUntil: "load" });
await tab.screenshot({ path: screenshot, fullPage: process.argv[5] !== "window", timeout: 120000 });
const shown = await tab.evaluate(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  return {
    title: document.title,
    headings: all("h2").map((heading) => heading.textContent),
    images: [...document.images].map((image) => ({ decoded: image.complete ? image.naturalWidth : 0, width: image.width })),
    cells: all("td").map((cell) => cell.textContent),
    links: all('nav a[href^="#"]').map((link) => document.querySelector(link.getAttribute("href")) !== null),
    equations: all("math").map((math) => ({ height: math.getBoundingClientRect().height })),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth, // px beyond the window
  };
});
await browser.close();
console.log(JSON.stringify({ ...seen, ...shown }));
