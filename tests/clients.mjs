// openai-node, ollama-js and the Vercel AI SDK against a server: node clients.mjs LIBRARY ADDRESS PICTURE QUESTION
// Prints {"texts": [...], "parsed": {...}}.
import { readFileSync } from "node:fs";

const [library, address, picture, question] = process.argv.slice(2);
const base64 = readFileSync(picture).toString("base64");
const url = `data:image/png;base64,${base64}`;
const schema = {
  type: "object",
  properties: { red: { type: "boolean" }, count: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["red", "count"],
  additionalProperties: false,
};

async function openai() {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none" });
  const text = { type: "text", text: question };
  const image = { type: "image_url", image_url: { url } };
  const ask = (content, more) =>
    client.chat.completions.create({ model: "llava", messages: [{ role: "user", content }], ...more });
  const texts = [];
  for (const content of [[text, image], [image, text]]) {
    texts.push((await ask(content)).choices[0].message.content);
  }
  let streamed = "";
  for await (const chunk of await ask([text, image], { stream: true })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
  }
  const response_format = { type: "json_schema", json_schema: { name: "sight", strict: true, schema } };
  const parsed = await ask([text, image], { response_format });
  return { texts: [...texts, streamed], parsed: JSON.parse(parsed.choices[0].message.content) };
}

async function ollama() {
  const { Ollama } = await import("ollama");
  const client = new Ollama({ host: address });
  const messages = [{ role: "user", content: question, images: [base64] }];
  const chat = await client.chat({ model: "llava", messages });
  const generated = await client.generate({ model: "llava", prompt: question, images: [base64] });
  let streamed = "";
  for await (const part of await client.chat({ model: "llava", messages, stream: true })) {
    streamed += part.message.content;
  }
  const parsed = await client.chat({ model: "llava", messages, format: schema });
  return {
    texts: [chat.message.content, generated.response, streamed],
    parsed: JSON.parse(parsed.message.content),
  };
}

async function ai() {
  const { generateObject, generateText, jsonSchema, streamText } = await import("ai");
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({
    name: "pocketllava",
    baseURL: `${address}/v1`,
    supportsStructuredOutputs: true,
  });
  const model = provider("llava");
  const content = [
    { type: "text", text: question },
    { type: "image", image: Buffer.from(base64, "base64"), mediaType: "image/png" },
  ];
  const messages = [{ role: "user", content }];
  const whole = await generateText({ model, messages });
  let streamed = "";
  for await (const piece of streamText({ model, messages }).textStream) streamed += piece;
  const parsed = await generateObject({ model, messages, schema: jsonSchema(schema) });
  return { texts: [whole.text, streamed], parsed: parsed.object };
}

const found = await { openai, ollama, ai }[library]();
console.log(JSON.stringify(found));
