// Calls to the server.

/** An answer of the server that is an error, with its message. */
export class Refused extends Error {}

/** A stream that ended early, or holds something else than chunks. */
export class Broken extends Error {}

/** The address of a path beside the page, behind a prefix too. Fetch refuses the credentials that the page's may hold. */
const beside = (path) => new URL(path, location.origin + location.pathname);

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not an error of this API, for example a proxy's.
  }
  throw new Refused(message);
}

export async function getJson(path, signal) {
  return (await checked(await fetch(beside(path), { headers: { Accept: "application/json" }, signal }))).json();
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Broken("not JSON");
  }
}

/** Yield the chunks of a streamed chat completion. */
export async function* chat(body, signal) {
  const response = await checked(
    await fetch(beside("v1/chat/completions"), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Broken("the stream has no end");
    const events = (held + value).split(/\r?\n\r?\n/);
    held = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (!data) continue; // a comment that keeps the connection open
      const chunk = parsed(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      yield chunk;
    }
  }
}
