"use strict";

const { readFileSync } = require("node:fs");
const celery = require("celery-node");

const broker = process.env.BROKER_URL || "redis://localhost:6379/0";
const results = process.env.RESULT_BACKEND || "redis://localhost:6379/1";

// The third argument is the list that jobs are pushed to. celery-node knows no priorities: 5 is in the list's name.
// "idefics" alone is priority 0, which comes before all others.
const client = celery.createClient(broker, results, "idefics\u0006\u00165");

async function ask(task, args) {
  const job = client.createTask(task).applyAsync([], args);
  try {
    return await job.get(60_000);
  } catch (error) {
    // FAILURE, REVOKED or TIMEOUT. Of a failed job the exception's first argument is a stable code.
    const [code, message] = error.exc_message || [error.message, "no answer"];
    throw Object.assign(new Error(message), { code });
  }
}

async function main() {
  const picture = process.argv[2] || "../pictures/cat.png";
  const image = `data:image/png;base64,${readFileSync(picture).toString("base64")}`;

  const caption = await ask("idefics.caption", { image });
  console.log(caption.text.trim());

  const answer = await ask("idefics.answer", { image, question: "What colour is the background?" });
  console.log(answer.text.trim());
}

main()
  .catch((error) => {
    console.error(`${error.code}: ${error.message}`);
    process.exitCode = 1;
  })
  .finally(() => client.disconnect());
