"use strict";

const { readFileSync } = require("node:fs");
const celery = require("celery-node");

const broker = process.env.BROKER_URL || "redis://localhost:6379/0";
const results = process.env.RESULT_BACKEND || "redis://localhost:6379/1";

// The third argument is the list that jobs are pushed to. celery-node knows no priorities: 5 is in the list's name.
// "idefics" alone is priority 0, which comes before all others.
const client = celery.createClient(broker, results, "idefics\u0006\u00165");

async function ask(task, args) {
  // applyAsync drops the promise with which it sends: while Redis is away, its rejection would end the process.
  try {
    await client.isReady();
  } catch (error) {
    throw failed("broker_unavailable", `Redis does not answer (${error.message}).`);
  }
  const job = client.createTask(task).applyAsync([], args);
  try {
    return await job.get(60_000);
  } catch (error) {
    throw failure(error);
  }
}

// `get` rejects with an Error whose message is FAILURE, REVOKED or TIMEOUT, and which has the record's exc_type and
// exc_message as properties.
function failure(error) {
  const [first, second, detail] = error.exc_message || [];
  if (error.exc_type === "TaskRevokedError") {
    // "terminated" or "revoked", with the result so far if there is one, or "expired".
    const code = first === "expired" ? "expired" : "canceled";
    return failed(code, `The job was ${code} before its end.`, { partial: second });
  }
  if (error.exc_type) {
    // A stable code, a sentence that says what to do, and sometimes the exact cause.
    return failed(first, second, { detail });
  }
  return error.message === "TIMEOUT" ? failed("timeout", "No answer within 60 s: does a worker run?") : error;
}

function failed(code, message, more = {}) {
  return Object.assign(new Error(message), { code, ...more });
}

async function main() {
  const picture = process.argv[2] || "../pictures/cat.png";
  const image = `data:image/png;base64,${readFileSync(picture).toString("base64")}`;

  const caption = await ask("idefics.caption", { image });
  console.log(caption.text.trim());

  const answer = await ask("idefics.answer", { image, question: "What colour is the background?" });
  console.log(answer.text.trim());
}

if (require.main === module) {
  main()
    .then(() => client.disconnect())
    .catch((error) => {
      console.error(`${error.code}: ${error.message}`);
      // Not disconnect(), which would wait while Redis is away.
      process.exit(1);
    });
}

module.exports = { ask, client, failure };
